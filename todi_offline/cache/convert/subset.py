"""A cache in, a smaller one out: some of its sequences, with narrower rows, or in another encoding."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np

from todi_offline.cache.convert.choosing import Selection
from todi_offline.cache.convert.copying import sequence_rows
from todi_offline.cache.format.fingerprint import hash_json
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.objects import read_root, read_tokenizer
from todi_offline.cache.planning import plan_shards
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.reader import Cache, read_all
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheMismatchError, TargetsError

_COARSE = ("q8", "root8")


def subset_cache(
    cache: Cache,
    out: str,
    chosen: Selection,
    criteria: Mapping[str, Any],
    progress: Progress = no_progress,
    **settings: Any,
) -> Manifest:
    """Write the chosen sequences of a cache to another, in their order; return its manifest.

    `settings` are the fields of `CacheSettings` to change: fewer entries, temperatures or samples, another encoding,
    codec or shard size. With the same encoding the stored numbers stay the same. From f16 and bf16_logit the rows can
    go to another encoding, which rounds them a second time. `criteria` describe the choice in the manifest. The same
    call again continues a stopped one.

    Raises:
        CacheMismatchError: no sequence is chosen; the cache holds less than the settings ask for; or its encoding is
            coarse and the settings name another one.
        TargetsError: the encoding needs numbers that the cache does not hold.
        CacheError: `out` cannot be written or holds another cache.
    """
    if not chosen.any():
        raise CacheMismatchError(
            f"no sequence of {cache.root} (it has {len(cache):,}) meets the conditions; change them"
        )
    asked = dataclasses.replace(cache.manifest.settings, **settings)
    _require_precise(cache, asked)
    first = next(read_all(cache, [0]))
    narrow(first.targets[:1], asked, cache.content_keys[0])  # raises before anything is written
    indices = np.flatnonzero(chosen)
    plan = plan_shards(cache.num_tokens[indices].tolist(), asked.shard_tokens)
    part = Part(
        recipe={"subset_of": hash_json([part.content for part in cache.manifest.parts]), **criteria},
        content=cache.content_keys[indices].digest(),
        num_sequences=len(indices),
        num_shards=len(plan),
        versions=cache.manifest.parts[-1].versions,
    )
    manifest = dataclasses.replace(cache.manifest, settings=asked, parts=(part,))
    tokenizer = read_tokenizer(cache.store, read_root(cache.store))
    with CacheWriter(out, manifest, tokenizer) as writer:
        missing = [shard for shard in writer.missing_shards() if shard < len(plan)]  # later captures own the others
        shards = {number: indices[plan[number].start : plan[number].stop].tolist() for number in missing}
        rows = _narrowed(cache, list(chain.from_iterable(shards.values())), asked)
        for done, (number, members) in enumerate(shards.items()):
            progress(done, len(missing))
            writer.write_shard(number, list(islice(rows, len(members))))
        writer.seal()
        progress(len(missing), len(missing))
    return manifest


def _require_precise(cache: Cache, asked: CacheSettings) -> None:
    """Refuse an encoding that is finer than the stored numbers: they would leave its bounds."""
    encodings = {member.manifest.settings.encoding for member in cache.members}
    if coarse := sorted(encodings & set(_COARSE) - {asked.encoding}):
        raise CacheMismatchError(
            f"{cache.root} holds log-probs in {', '.join(coarse)}, too coarse to be stored as {asked.encoding}; keep "
            f"{coarse[0]}, or take the subset of the f16 or bf16_logit cache from which this cache was made"
        )
    others = sorted(encodings - {"bf16_logit"})
    if others and asked.encoding == "bf16_logit":
        raise TargetsError(
            f"{cache.root} holds log-probs in {', '.join(others)}, not the logits that bf16_logit keeps; choose "
            "another encoding"
        )


def _narrowed(cache: Cache, indices: list[int], settings: CacheSettings) -> Iterator[SequenceRows]:
    for sequence in sequence_rows(cache, indices):
        yield dataclasses.replace(sequence, targets=narrow(sequence.targets, settings, sequence.content_key))
