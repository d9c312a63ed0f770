"""A cache in, everything that is wrong with it out, one problem at a time; memory does not grow with the cache.

Three rounds: the objects (those that the seal and the records name, whole, and no others), the sequence tables, and
what the sequences hold. A shard with a damaged object is not looked into further.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from todi_offline.cache.commit import SEAL_KEY, CommitRecord, ObjectSum, Seal, read_record, read_seal
from todi_offline.cache.encoding import Q8_STEPS_PER_NAT, TargetRows
from todi_offline.cache.fingerprint import content_key, hash_bytes
from todi_offline.cache.layout import record_key, sequences_key
from todi_offline.cache.manifest import Manifest
from todi_offline.cache.reader import Cache, CachedSequence, read_manifest, read_table
from todi_offline.cache.shard import ShardFile
from todi_offline.cache.writer import array_metadata, metadata_keys
from todi_offline.errors import CacheError

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a cache."""

    where: str
    """An object, or a sequence."""
    what: str
    """What was found, and what was expected."""
    remedy: str
    """What it takes to mend it."""


def verify_cache(root: Path, progress: Callable[[int, int], None] = lambda *_: None) -> Iterator[Problem]:
    """Yield everything that is wrong with the cache at `root`; `progress` is told the shards done and all of them."""
    try:
        manifest = read_manifest(root)
        seal = read_seal(root)
    except CacheError as error:
        yield Problem(str(root), str(error), "run the capture that made it again")
        return
    known = {SEAL_KEY, *seal.objects}
    yield from _metadata_problems(root, manifest, seal)
    sums = np.zeros(3, np.int64)
    for shard in range(seal.num_shards):
        progress(shard, seal.num_shards)
        try:
            record = read_record(root, record_key(shard))
        except CacheError as error:
            yield Problem(record_key(shard), str(error), _again(shard))
            known |= _object_keys(manifest, shard)  # those that it would have named
            continue
        known |= record.objects.keys()
        sums += record.num_sequences, record.num_tokens, record.num_targets
        yield from _shard_problems(root, manifest, record, shard)
    progress(seal.num_shards, seal.num_shards)
    if sums.tolist() != [seal.num_sequences, seal.num_tokens, seal.num_targets]:
        what = f"it has other numbers of sequences, tokens and targets than the records' {sums.tolist()}"
        yield Problem(SEAL_KEY, what, "delete it and run the same capture again")
    for path in sorted(root.rglob("*")):
        key = path.relative_to(root).as_posix()
        if not path.is_dir() and key not in known:
            yield Problem(key, "no record names it", "delete it")


def _metadata_problems(root: Path, manifest: Manifest, seal: Seal) -> Iterator[Problem]:
    remedy = "delete sealed.json and run the same capture again"
    expected = {*metadata_keys(root, manifest), *map(record_key, range(seal.num_shards))}
    if unnamed := expected - seal.objects.keys():
        yield Problem(SEAL_KEY, f"it does not name {', '.join(sorted(unnamed))}", remedy)
    for key, expected_sum in seal.objects.items():
        if what := _difference(root / key, expected_sum):
            yield Problem(key, what, remedy)
    for name, spec in manifest.arrays.items():
        path = root / name / "zarr.json"
        if path.is_file() and path.read_bytes() != array_metadata(spec, manifest.settings.codec, seal.num_shards):
            yield Problem(f"{name}/zarr.json", "it is not what the manifest leads to", remedy)


def _shard_problems(root: Path, manifest: Manifest, record: CommitRecord, shard: int) -> Iterator[Problem]:
    expected = _object_keys(manifest, shard)
    if record.shard != shard or record.objects.keys() != expected:
        differing = ", ".join(sorted(record.objects.keys() ^ expected)) or f"shard {record.shard}"
        yield Problem(record_key(shard), f"it is not the record of shard {shard}: {differing}", _again(shard))
        return
    damaged = False
    for key, expected_sum in record.objects.items():
        if what := _difference(root / key, expected_sum):
            damaged = True
            yield Problem(key, what, _again(shard))
    if damaged:
        return
    try:
        cache = Cache(root, manifest, read_table(root, shard))
        yield from _table_problems(cache, record, shard)
        for index in range(len(cache)):
            name = f"sequence {cache.sequences['id'][index].as_py()!r}"
            for what in _sequence_problems(manifest, cache[index], cache.sequences.slice(index, 1).to_pylist()[0]):
                yield Problem(name, what, _again(shard))
        yield from _unused_problems(root, manifest, record, shard)
    except CacheError as error:
        yield Problem(f"shard {shard}", str(error), _again(shard))


def _table_problems(cache: Cache, record: CommitRecord, shard: int) -> Iterator[Problem]:
    """Sequences must lie end to end from the beginning of the shard, and be as many as the record says."""
    where, first = sequences_key(shard), shard * cache.manifest.settings.shard_tokens
    columns = {name: cache.sequences[name].to_numpy() for name in cache.sequences.column_names[3:]}
    if (columns["shard"] != shard).any():
        yield Problem(where, f"it names other shards than {shard}", _again(shard))
    for axis in ("token", "target"):
        counts = columns[f"num_{axis}s"].astype(np.int64)
        if (columns[f"{axis}_start"] != first + np.cumsum(counts) - counts).any() or (counts < 0).any():
            yield Problem(where, f"its sequences overlap or leave gaps on the {axis} axis", _again(shard))
    found = (len(cache), int(columns["num_tokens"].sum()), int(columns["num_targets"].sum()))
    if found != (record.num_sequences, record.num_tokens, record.num_targets):
        yield Problem(where, f"it has {found} sequences, tokens and targets; the record has others", _again(shard))
    if hash_bytes(cache.sequences["content_key"].to_pylist()) != record.content:
        yield Problem(where, "its content keys are not those of the commit record", _again(shard))


def _sequence_problems(manifest: Manifest, sequence: CachedSequence, row: dict[str, Any]) -> Iterator[str]:
    if content_key(sequence.token_ids, sequence.target_mask) != row["content_key"]:
        yield "its tokens and mask do not give its content key"
    if sequence.target_mask[-1:].any():
        yield "its last position is supervised, which no token follows"
        return
    labels = sequence.token_ids[np.flatnonzero(sequence.target_mask) + 1]
    if (sequence.token_ids >= manifest.vocab_size).any():
        yield f"it has token ids beyond the vocabulary of {manifest.vocab_size}"
    rows = sequence.targets
    yield from _row_problems(rows, labels, manifest)
    nll = -rows.label_logprob.mean(dtype=np.float64)
    if not abs(nll - row["teacher_nll"]) <= 1e-4 * max(1.0, abs(nll)):
        yield f"its mean label log-prob gives an NLL of {nll:.5f}, the table has {row['teacher_nll']:.5f}"
    mass, slack = _kept_mass(rows, manifest.settings.encoding)
    if not abs(mass.mean() - row["topk_mass"]) <= slack.mean():
        yield f"its kept entries have a mean mass of {mass.mean():.5f}, the table has {row['topk_mass']:.5f}"


def _row_problems(rows: TargetRows, labels: npt.NDArray[np.uint32], manifest: Manifest) -> Iterator[str]:
    """Check every target's row: order, ids, masses, tail and label."""
    ids, logprobs = rows.ids.astype(np.int64), rows.logprobs
    if (ids >= manifest.vocab_size).any() or (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        yield f"a row has ids that repeat or lie beyond the vocabulary of {manifest.vocab_size}"
    if not (logprobs <= 0).all() or (logprobs[:, 1:] > logprobs[:, :-1]).any():
        yield "a row's log-probs do not fall from 0 or below, or are NaN"
        return
    mass, slack = _kept_mass(rows, manifest.settings.encoding)
    tail = np.exp(rows.tail_logsumexp[:, rows.temperatures.index(1.0)]) if 1.0 in rows.temperatures else None
    if np.isnan(rows.tail_logsumexp).any() or (mass > 1 + slack).any():
        yield "a row's kept mass is above 1, or its tail is NaN"
    elif tail is not None and (abs(mass + tail - 1) > slack).any():
        yield f"a row's kept and tail mass differ from 1 by {abs(mass + tail - 1).max():.4f}"
    kept = ids == labels[:, None]
    stored = np.where(kept, logprobs, 0).sum(axis=1)
    near = abs(stored - rows.label_logprob) <= _slack(rows.label_logprob, manifest.settings.encoding)
    if not (rows.label_logprob <= 0).all() or not (near | ~kept.any(axis=1) | (stored < -15)).all():
        yield "a label's log-prob is positive, NaN, or not that of the same id among the kept ones"
    if rows.tail_ids is not None and rows.tail_logprobs is not None:
        among_kept = (rows.tail_ids[:, :, None] == rows.ids[:, None, :]).any(axis=2)
        wrong = among_kept | (rows.tail_ids >= manifest.vocab_size) | ~(rows.tail_logprobs <= 0)
        if (wrong & ~np.isneginf(rows.tail_logprobs)).any():
            yield "a tail sample is a kept id, lies beyond the vocabulary, or has no log-prob"


def _unused_problems(root: Path, manifest: Manifest, record: CommitRecord, shard: int) -> Iterator[Problem]:
    """Rows that no sequence owns must be 0."""
    used = {"token": record.num_tokens, "target": record.num_targets}
    for spec in manifest.arrays.values():
        file = ShardFile(root / spec.object_key(shard), spec, manifest.settings.codec)
        start = used[spec.axis]
        for chunk in range(start // spec.chunk_rows, spec.chunks_per_shard):
            if file.read_chunk(chunk)[max(0, start - chunk * spec.chunk_rows) :].any():
                yield Problem(spec.object_key(shard), "rows that no sequence owns are not 0", _again(shard))
                break


def _kept_mass(rows: TargetRows, encoding: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mass of each row's kept entries, and how far the encoding may have moved it."""
    p = np.exp(rows.logprobs, dtype=np.float64)
    return p.sum(axis=1), (p * _slack(rows.logprobs, encoding)).sum(axis=1) + 1e-4


def _slack(logprobs: npt.NDArray[np.float32], encoding: str) -> npt.NDArray[np.float64]:
    """Return the bound of `encoding.py`, with a little for float32, in nats."""
    if encoding == "q8":
        return np.full(logprobs.shape, 0.51 / Q8_STEPS_PER_NAT + 1e-3)
    return np.where(np.isneginf(logprobs), 0, abs(logprobs)).astype(np.float64) * 2.0**-10 + 1e-5


def _object_keys(manifest: Manifest, shard: int) -> set[str]:
    return {sequences_key(shard), *(spec.object_key(shard) for spec in manifest.arrays.values())}


def _difference(path: Path, expected: ObjectSum) -> str | None:
    """Return how a file differs from what was written, reading it in blocks."""
    try:
        with path.open("rb") as file:
            num_bytes, crc = 0, 0
            while block := file.read(_BLOCK_BYTES):
                num_bytes += len(block)
                crc = google_crc32c.extend(crc, block)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if (num_bytes, crc) == (expected.num_bytes, expected.crc32c):
        return None
    return f"it has {num_bytes} bytes with crc32c {crc:08x}, expected {expected.num_bytes} with {expected.crc32c:08x}"


def _again(shard: int) -> str:
    return f"delete {record_key(shard)} and sealed.json, and run the same capture again: it redoes shard {shard} alone"
