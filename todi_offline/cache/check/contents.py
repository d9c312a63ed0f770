"""A committed shard in, the problems of its table, its tokens and its targets out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.check.invariants import SLACK, faults, mass_bounds
from todi_offline.cache.check.problems import Problem, redo
from todi_offline.cache.format.encoding import bounds, decode_rows
from todi_offline.cache.format.keys import ContentKeys, content_key
from todi_offline.cache.format.layout import CHUNK_TARGETS
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import sequences_key
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.sequences import require_places
from todi_offline.cache.format.shard import CRC_BYTES
from todi_offline.cache.objects import open_shard
from todi_offline.cache.shard_file import ShardFile
from todi_offline.cache.store import Store
from todi_offline.errors import CacheError


def content_problems(store: Store, manifest: Manifest, table: pa.Table, record: CommitRecord) -> Iterator[Problem]:
    """Yield the problems of a shard whose objects are intact.

    Raises:
        CacheError: an object cannot be read.
    """
    found = list(_table_problems(store, manifest, table, record))
    yield from found or _row_problems(store, manifest, table, record)


def _table_problems(store: Store, manifest: Manifest, table: pa.Table, record: CommitRecord) -> Iterator[Problem]:
    """Sequences must lie end to end from the beginning of the shard, in the numbers of the record."""
    shard, where = record.shard, sequences_key(record.shard)
    try:
        require_places(str(store), table, manifest.settings.shard_tokens, shard)
    except CacheError as error:
        yield Problem(where, str(error), redo(shard))
        return
    for axis in ("token", "target"):
        counts = table[f"num_{axis}s"].to_numpy().astype(np.int64)
        starts = shard * manifest.settings.shard_tokens + np.cumsum(counts) - counts
        if (table[f"{axis}_start"].to_numpy() != starts).any():
            yield Problem(where, f"its sequences overlap or leave gaps on the {axis} axis", redo(shard))
    found = (len(table), int(table["num_tokens"].to_numpy().sum()), int(table["num_targets"].to_numpy().sum()))
    expected = (record.num_sequences, record.num_tokens, record.num_targets)
    if found != expected:
        what = f"it has {found} sequences, tokens and targets; the commit record has {expected}"
        yield Problem(where, what, redo(shard))
    if ContentKeys.from_column(table["content_key"]).digest() != record.content:
        yield Problem(where, "its content keys are not those of the commit record", redo(shard))


def _row_problems(store: Store, manifest: Manifest, table: pa.Table, record: CommitRecord) -> Iterator[Problem]:
    """Check the tokens of a shard at once, its targets one chunk at a time."""
    shard = record.shard
    files = {name: open_shard(store, manifest, record.objects, name, shard) for name in manifest.arrays}
    token_ids, mask = (_stored_rows(files.pop(name)) for name in ("token_ids", "target_mask"))
    broken = list(_token_problems(manifest, table, shard, token_ids, mask))
    yield from broken
    if not broken:
        yield from _target_problems(manifest, table, record, files, token_ids[np.flatnonzero(mask) + 1])


def _stored_rows(file: ShardFile) -> npt.NDArray[Any]:
    """Return the rows of the stored chunks; the settings may claim any number of others."""
    return file.read_rows(0, len(file.read_sums()) // CRC_BYTES * file.spec.chunk_rows)


def _target_problems(
    manifest: Manifest,
    table: pa.Table,
    record: CommitRecord,
    files: dict[str, ShardFile],
    labels: npt.NDArray[np.uint32],
) -> Iterator[Problem]:
    settings, shard = manifest.settings, record.shard
    num_chunks = max(len(file.read_sums()) // CRC_BYTES for file in files.values())
    owner = np.repeat(np.arange(len(table)), table["num_targets"].to_numpy())
    sums, found = np.zeros((4, len(table))), dict[str, list[int]]()
    for chunk in range(num_chunks):
        span = slice(chunk * CHUNK_TARGETS, (chunk + 1) * CHUNK_TARGETS)
        owners = owner[span]
        stored = {name: file.read_chunk(chunk) for name, file in files.items()}
        for name, values in stored.items():
            if values[len(owners) :].any():
                what = f"rows of chunk {chunk} that belong to no sequence are not 0"
                yield Problem(manifest.arrays[name].object_key(shard), what, redo(shard))
        used = {name: values[: len(owners)] for name, values in stored.items()}
        rows = decode_rows(used, settings.encoding, settings.temperatures, settings.tail_temperature)
        for fault, wrong in faults(rows, labels[span], settings.encoding, manifest.vocab_size).items():
            if wrong.any():
                found.setdefault(fault, []).extend(owners[wrong].tolist())
        label = bounds(rows, settings.encoding)["label_logprob"]
        numbers: list[npt.NDArray[Any]] = [*label, *mass_bounds(rows, settings.encoding)]
        for index, weights in enumerate(numbers):
            sums[index] += np.bincount(owners, weights=weights, minlength=len(table))
    for fault, sequences in found.items():
        others = f", and {len(sequences) - 1} more targets of shard {shard}" if len(sequences) > 1 else ""
        yield Problem(_name(table, sequences[0]), f"in one of its targets{others}, {fault}", redo(shard))
    yield from _mean_problems(table, shard, sums)


def _token_problems(
    manifest: Manifest, table: pa.Table, shard: int, token_ids: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8]
) -> Iterator[Problem]:
    num_tokens = table["num_tokens"].to_numpy()
    stops = np.cumsum(num_tokens)
    used = int(num_tokens.sum())
    for name, values in (("token_ids", token_ids), ("target_mask", mask)):
        if values[used:].any():
            what = "rows that belong to no sequence are not 0"
            yield Problem(manifest.arrays[name].object_key(shard), what, redo(shard))
    rows = zip(
        stops - num_tokens, stops, table["content_key"].to_pylist(), table["num_targets"].to_pylist(), strict=True
    )
    for index, (start, stop, key, num_targets) in enumerate(rows):
        for what in _sequence_problems(token_ids[start:stop], mask[start:stop], key, num_targets, manifest.vocab_size):
            yield Problem(_name(table, index), what, redo(shard))


def _sequence_problems(
    token_ids: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8], key: bytes, num_targets: int, vocab_size: int
) -> Iterator[str]:
    if (token_ids >= vocab_size).any():
        yield f"it has token ids beyond the vocabulary of {vocab_size}"
    if (mask > 1).any() or mask[-1:].any():
        yield "its mask has values other than 0 and 1, or supervises the last position, which no token follows"
    if content_key(token_ids, mask.astype(np.bool_)) != key:
        yield "its content key is not that of its tokens and mask"
    if np.count_nonzero(mask) != num_targets:
        yield f"its mask supervises {np.count_nonzero(mask)} positions, but the table has {num_targets} targets"


def _mean_problems(table: pa.Table, shard: int, sums: npt.NDArray[np.float64]) -> Iterator[Problem]:
    """Compare the means of the table with those of the rows."""
    num_targets = table["num_targets"].to_numpy()
    least_label, most_label, least, most = sums / num_targets
    nll, mass = (table[name].to_numpy().astype(np.float64) for name in ("teacher_nll", "topk_mass"))
    nearest = nll.clip(-most_label, -least_label)
    differs = {
        "teacher NLL": ~np.isclose(nll, nearest, rtol=SLACK, atol=SLACK),
        "mean top-k mass": ~((least - SLACK <= mass) & (mass <= most + SLACK)),
    }
    for name, wrong in differs.items():
        for index in np.flatnonzero(wrong & (num_targets > 0)):
            rows = f"NLL {-most_label[index]:.5f}, mass {most[index]:.5f}"
            what = f"its {name} in the table differs from that of its rows ({rows})"
            yield Problem(_name(table, int(index)), what, redo(shard))


def _name(table: pa.Table, index: int) -> str:
    return f"sequence {table['id'][index].as_py()!r}"
