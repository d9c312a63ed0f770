"""A cache in, its contents and its size in numbers out, and some of its rows for people to read."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from todi_offline.cache.format.codecs import codec_name
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, read_all

_SAMPLED_SEQUENCES = 64
_SAMPLED_TARGETS = 64  # of each
_SHOWN_IDS = 5
_CONTEXT_TOKENS = 12  # shown before a label

TextOf = Callable[[list[int]], str]
"""Returns the text of some ids."""


def summarise_cache(cache: Cache, num_rows: int = 0, text_of: TextOf | None = None) -> dict[str, Any]:
    """Return the contents and the size of a cache as JSON-able values, with `num_rows` of its targets."""
    manifest, num_targets = cache.manifest, int(cache.num_targets.sum())
    num_bytes = cache.bytes_by_array
    nll = np.average(cache.columns["teacher_nll"], weights=cache.num_targets)
    return {
        "sequences": len(cache),
        "tokens": int(cache.num_tokens.sum()),
        "targets": num_targets,
        "bytes": sum(num_bytes.values()),
        "bytes_per_target": sum(num_bytes.values()) / num_targets,
        "teacher_nll": float(nll),
        "coverage": coverage(cache),
        "arrays": {
            name: {
                "dtype": spec.dtype.name,
                "shape": spec.shape(manifest.num_shards * spec.shard_rows),
                "shard": spec.shape(spec.shard_rows),
                "chunk": spec.shape(spec.chunk_rows),
                "codec": codec_name(spec.dtype, manifest.settings.codec),
                "bytes_per_target": num_bytes[name] / num_targets,
            }
            for name, spec in manifest.arrays.items()
        },
        "manifest": manifest.to_json(),
        "rows": list(sample_rows(cache, num_rows, text_of)),
    }


def size_of(cache: Cache) -> dict[str, Any]:
    """Return the numbers of sequences and targets of a cache, and the bytes of a target."""
    num_targets = int(cache.num_targets.sum())
    num_bytes = sum(cache.bytes_by_array.values())
    return {"sequences": len(cache), "targets": num_targets, "bytes_per_target": num_bytes / num_targets}


def coverage(cache: Cache) -> dict[int, float]:
    """Return the mean teacher mass of the first k entries, for k = 1, 2, 4, ..., over some targets spread evenly.

    A cache without entries has none.
    """
    parts = []
    for sequence in read_all(cache, _spread(len(cache), _SAMPLED_SEQUENCES)):
        logprobs = sequence.targets.logprobs
        parts.append(np.exp(logprobs[_spread(len(logprobs), _SAMPLED_TARGETS)], dtype=np.float64).cumsum(axis=1))
    mass = np.concatenate(parts).mean(axis=0)
    if not len(mass):
        return {}
    widths = {2**power for power in range(len(mass).bit_length()) if 2**power < len(mass)} | {len(mass)}
    return {k: float(mass[k - 1]) for k in sorted(widths)}


def sample_rows(cache: Cache, count: int, text_of: TextOf | None) -> Iterator[dict[str, Any]]:
    """Yield `count` targets in order: a random draw from all targets, the same one each time."""
    ends = np.cumsum(cache.num_targets, dtype=np.int64)
    total = int(ends[-1])
    for number in sorted(np.random.default_rng(0).choice(total, min(count, total), replace=False).tolist()):
        index = int(np.searchsorted(ends, number, side="right"))
        target = number - int(ends[index] - cache.num_targets[index])
        yield {"sequence": cache.sequences["id"][index].as_py(), **_row(cache[index], target, text_of)}


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` of the first `total` numbers, spread evenly."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist() if total else []


def _row(sequence: CachedSequence, target: int, text_of: TextOf | None) -> dict[str, Any]:
    rows = sequence.targets
    position = int(np.flatnonzero(sequence.target_mask)[target])

    def entry(number: Any, logprob: Any) -> dict[str, Any]:
        named = {"id": int(number), "p": float(np.exp(logprob))}
        return named if text_of is None else named | {"text": text_of([int(number)])}

    def entries(ids: Any, logprobs: Any) -> list[dict[str, Any]]:
        return [entry(*pair) for pair in zip(ids[target, :_SHOWN_IDS], logprobs[target, :_SHOWN_IDS], strict=True)]

    tails = zip(rows.temperatures, rows.tail_logsumexp[target], strict=True)
    before = sequence.token_ids[: position + 1][-_CONTEXT_TOKENS:].tolist()
    return {
        "position": position,
        "before": {"ids": before} | ({} if text_of is None else {"text": text_of(before)}),
        "label": entry(sequence.token_ids[position + 1], rows.label_logprob[target]),
        "top": entries(rows.ids, rows.logprobs),
        "drawn": [] if rows.tail_ids is None else entries(rows.tail_ids, rows.tail_logprobs),
        "kept_mass": float(np.exp(rows.logprobs[target]).sum()),
        "tail_logsumexp": {f"{temperature:g}": float(value) for temperature, value in tails},
    }
