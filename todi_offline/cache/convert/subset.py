"""A cache in, a smaller one out: some of its sequences, with less of each, or stored in another way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from todi_offline.cache.convert.choosing import Selection
from todi_offline.cache.convert.copying import sequence_rows
from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.fingerprint import hash_json
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.objects import read_root, read_tokenizer
from todi_offline.cache.planning import plan_shards
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.reader import Cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheMismatchError

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

    `settings` are fields of `CacheSettings` that differ from the cache's: fewer entries, temperatures or samples,
    another encoding, codec or shard size. Rows come out as they went in where the encoding stays; from f16 and
    bf16_logit they go to another encoding with the rounding of both. `criteria` say in the manifest what was chosen.
    The same call again goes on.

    Raises:
        CacheMismatchError: nothing is chosen, the cache holds less than is asked for, or it holds log-probs in a coarse
            encoding and another one is asked for.
        TargetsError: the encoding needs what the cache has not.
        CacheError: `out` cannot be written or holds something else.
    """
    if not chosen.any():
        raise CacheMismatchError(f"of the {len(cache):,} sequences of {cache.root} none is chosen; ask for others")
    asked = dataclasses.replace(cache.manifest.settings, **settings)
    _require_precise(cache, asked)
    sample = narrow(cache[0].targets[:1], asked, cache.content_keys[0])
    encode_rows(sample, asked.encoding)  # before anything is written: it may ask for what the cache has not
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
        missing = writer.missing_shards()
        for done, number in enumerate(missing):
            progress(done, len(missing))
            members = indices[plan[number].start : plan[number].stop].tolist()
            writer.write_shard(number, _narrowed(cache, members, asked))
        writer.seal()
        progress(len(missing), len(missing))
    return manifest


def _require_precise(cache: Cache, asked: CacheSettings) -> None:
    """Refuse another encoding of log-probs that a coarse one has rounded: they would lie beyond the bounds of both."""
    encodings = {member.manifest.settings.encoding for member in cache.members}
    if coarse := sorted(encodings & set(_COARSE) - {asked.encoding}):
        raise CacheMismatchError(
            f"{cache.root} holds log-probs in {', '.join(coarse)}, which {asked.encoding} would not keep within its "
            f"bounds; keep {coarse[0]}, or take the subset of the f16 or bf16_logit cache that it was made of"
        )


def _narrowed(cache: Cache, indices: list[int], settings: CacheSettings) -> list[SequenceRows]:
    return [
        dataclasses.replace(sequence, targets=narrow(sequence.targets, settings, sequence.content_key))
        for sequence in sequence_rows(cache, indices)
    ]
