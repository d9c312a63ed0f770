"""Earlier caches and the manifest of a capture in; one cache out, whose rows the capture may copy."""

from collections.abc import Sequence

from todi_offline.cache.format.manifest import Manifest, identity_differences
from todi_offline.cache.reader import Cache, holds, open_cache, union
from todi_offline.errors import CacheMismatchError


def open_reusable(places: Sequence[str], wanted: Manifest) -> Cache | None:
    """Return all sequences that a capture with this manifest may copy, narrowed to its settings; None without a place.

    Of an unfinished cache the committed shards are used. Where several caches hold a sequence, one with exactly these
    settings goes before one that holds more, because narrowing rounds the mass of the tail.

    Raises:
        CacheMismatchError: a cache has another teacher, tokenizer, vocabulary or encoding, or holds too little.
    """
    caches = [open_cache(place, allow_unsealed=True) for place in places]
    for cache in caches:
        _require_serving(cache, wanted)
    caches.sort(key=lambda cache: holds(cache.manifest.settings) != holds(wanted.settings))
    return union(caches, wanted.settings) if caches else None


def _require_serving(cache: Cache, wanted: Manifest) -> None:
    """Refuse a cache of another teacher, tokenizer, vocabulary or encoding, and one that holds too little."""
    found, asked = cache.manifest.settings, wanted.settings
    lines = identity_differences(cache.manifest, wanted, ("there", "here"), ("teacher", "tokenizer", "vocab_size"))
    serves = {
        "encoding": found.encoding == asked.encoding,
        "k": found.k >= asked.k,
        "temperatures": set(found.temperatures) >= set(asked.temperatures),
        "tail_samples": found.tail_samples >= asked.tail_samples,
        "tail_temperature": not asked.tail_samples or found.tail_temperature == asked.tail_temperature,
        "tail_seed": not asked.tail_samples or found.tail_seed == asked.tail_seed,
    }
    lines += [
        f"{name}: {getattr(found, name)!r} in the cache, {getattr(asked, name)!r} requested"
        for name, does in serves.items()
        if not does
    ]
    if lines:
        raise CacheMismatchError(
            f"{cache.root} cannot be reused: {'; '.join(lines)}; request no more than it holds, convert it with "
            "`todi-cache subset`, or leave it out of --reuse"
        )
