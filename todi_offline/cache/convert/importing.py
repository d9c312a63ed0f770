"""A plain Parquet table in, from whatever made it, a cache out."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from todi_offline.cache.check.invariants import faults
from todi_offline.cache.convert.export import MANIFEST_KEY, PLAIN_SCHEMA
from todi_offline.cache.format.encoding import decode_rows, encode_rows
from todi_offline.cache.format.fingerprint import hash_bytes
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import TOKENIZER_KEY
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.planning import plan_shards
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheFormatError, DataError, TargetsError, first_line

_BATCH_ROWS = 64
_BLOCK_BYTES = 2**20

Row = Mapping[str, Any]
"""A row of the table: its cells as Arrow scalars, by column."""
Numbers = npt.NDArray[np.float64]


def import_table(
    path: Path,
    out: str,
    described: Manifest | None = None,
    tokenizer_json: str | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a cache of the rows of a plain table (see `export_cache`); return its manifest.

    A table that `export_cache` wrote brings its own description; `described` is that of any other (its part is made
    here). Needed are input_ids, target_mask (or `positions`, the numbers of its true entries), target_ids and
    target_logprobs.

    - The entries of a target may stand in any order, and be more than k: as where a serving engine adds the label to
      its top k. What is beyond k goes into the tail.
    - Without tail_logsumexp, the tail at temperature 1 is log(1 - sum of the kept), in double precision: off by as
      much mass as the kept log-probs were rounded by, so of a small tail little is known. At another temperature
      it cannot be had.
    - Without label_logprob, it is that of the same id among the entries, which must have it.

    All rows are looked at before anything is written. The same call again goes on where it was stopped; the manifest
    has the hash of a table that brought none, so that a changed one is not taken for it.

    Raises:
        DataError: the table cannot be read, is not described, or has a wrong row, which is named.
        CacheError: `out` cannot be written or holds something else.
    """
    with opened_table(path) as table:
        own, tokenizer = _metadata(table, str(path))
        if described is not None:
            described = _with_recipe(described, {"source": "imported", "table": _hash_file(path)})
        elif (described := own) is None:
            raise DataError(f"{path} brings no manifest; say its teacher and tokenizer")
        _require_columns(table, described.settings, str(path))
        return _write(table, str(path), out, described, tokenizer_json or tokenizer, progress)


@contextlib.contextmanager
def opened_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; whatever is wrong with it, then and later, is a DataError."""
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _with_recipe(manifest: Manifest, recipe: Mapping[str, Any]) -> Manifest:
    return dataclasses.replace(manifest, parts=(dataclasses.replace(manifest.parts[0], recipe=recipe),))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hash_bytes(iter(partial(file.read, _BLOCK_BYTES), b""))


def _write(
    table: pq.ParquetFile,
    where: str,
    out: str,
    described: Manifest,
    tokenizer_json: str | None,
    progress: Progress,
) -> Manifest:
    columns, total = [*PLAIN_SCHEMA.names, "positions"], 2 * table.metadata.num_rows
    lengths, keys = [], []
    for number, row in _rows(table, columns):
        sequence = _sequence(number, row, where, described)
        lengths.append(len(sequence.token_ids))
        keys.append(sequence.content_key)
        progress(number + 1, total)
    plan = plan_shards(lengths, described.settings.shard_tokens)
    part = dataclasses.replace(
        described.parts[0], content=ContentKeys.of(keys).digest(), num_sequences=len(keys), num_shards=len(plan)
    )
    manifest = dataclasses.replace(described, parts=(part,))
    rows = _rows(table, columns)
    with CacheWriter(out, manifest, tokenizer_json) as writer:
        missing = set(writer.missing_shards())
        for shard in plan:
            members = (next(rows) for _ in shard.examples)
            if shard.index in missing:
                writer.write_shard(shard.index, [_sequence(number, row, where, manifest) for number, row in members])
            else:
                list(members)
            progress(len(keys) + shard.stop, total)
        writer.seal()
    return manifest


def _metadata(table: pq.ParquetFile, where: str) -> tuple[Manifest | None, str | None]:
    """Return the manifest and the tokenizer that a table brings."""
    metadata = table.schema_arrow.metadata or {}
    if MANIFEST_KEY.encode() not in metadata:
        return None, None
    tokenizer = metadata.get(TOKENIZER_KEY.encode())
    try:
        values = json.loads(metadata[MANIFEST_KEY.encode()])
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{where} brings a manifest that cannot be read: {error}") from error
    return Manifest.from_json(values, where), None if tokenizer is None else tokenizer.decode(errors="replace")


def _require_columns(table: pq.ParquetFile, settings: CacheSettings, where: str) -> None:
    names = table.schema_arrow.names
    mask = [] if "positions" in names else ["target_mask"]
    sampled = ["tail_ids", "tail_logprobs"] if settings.tail_samples else []
    needed = ["input_ids", *mask, "target_ids", "target_logprobs", *sampled]
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(names)}")
    if "tail_logsumexp" not in names and settings.temperatures != (1.0,):
        raise DataError(
            f"{where} has no tail_logsumexp, so temperature 1 is all that can be had of it, not "
            f"{', '.join(f'{t:g}' for t in settings.temperatures)}; ask for temperature 1 alone"
        )


def _rows(table: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    number = 0
    present = [name for name in columns if name in table.schema_arrow.names]
    for batch in table.iter_batches(_BATCH_ROWS, columns=present):
        for index in range(len(batch)):
            cells = {name: batch.column(name)[index] for name in present}
            yield number, {name: cell for name, cell in cells.items() if cell.is_valid}
            number += 1


def _tokens(number: int, row: Row, where: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """Return the tokens and the mask of a row."""
    with _located(number, where):
        ids = _list(row, "input_ids", np.int64)
        if "positions" in row:
            mask = np.zeros(len(ids), np.bool_)
            mask[_positions(row, len(ids))] = True
        else:
            mask = _list(row, "target_mask", np.bool_)
        if ids.shape != mask.shape or not mask.any() or mask[-1]:
            raise ValueError(
                f"it has {ids.size} input_ids and {mask.size} entries of target_mask, {int(mask.sum())} of them true; "
                "expected as many, one true at least and the last one false, for no token follows it"
            )
        if (ids < 0).any():
            raise ValueError(f"it has the token id {ids.min()}")
        return ids.astype(np.uint32), mask


def _positions(row: Row, length: int) -> npt.NDArray[np.int64]:
    positions = _list(row, "positions", np.int64)
    if (np.diff(positions, prepend=-1) <= 0).any() or (positions >= length).any():
        raise ValueError(f"its positions do not rise from 0 to {length - 2}, each once")
    return positions


def _sequence(number: int, row: Row, where: str, manifest: Manifest) -> SequenceRows:
    """Return a row as a sequence, its entries in order."""
    ids, mask = _tokens(number, row, where)
    with _located(number, where):
        if (ids >= manifest.vocab_size).any():
            raise ValueError(f"it has the token id {ids.max()}, beyond the vocabulary of {manifest.vocab_size}")
        labels = ids[np.flatnonzero(mask) + 1]
        targets = _targets(row, labels, manifest.settings)
        _require_possible(targets, labels, manifest)
        name, source = (row[column].as_py() if column in row else None for column in ("id", "source"))
    return SequenceRows(name or str(number), source or "imported", ids, mask, targets)


@dataclass(frozen=True, slots=True)
class _Entries:
    """All that a row says of its targets, the most probable first; where one has fewer, id -1 and log-prob -inf."""

    ids: npt.NDArray[np.int64]
    """[target, entry]"""
    logprobs: Numbers


def _targets(row: Row, labels: npt.NDArray[np.uint32], settings: CacheSettings) -> TargetRows:
    entries, k = _entries(row, len(labels), settings.k), settings.k
    kept, cut = entries.logprobs[:, :k], entries.logprobs[:, k:]
    if cut.shape[1] and settings.tail_samples:
        raise ValueError(f"it has {entries.ids.shape[1]} entries a target, and samples of what is beyond; ask for all")
    if "tail_logsumexp" in row:
        beyond = np.stack([np.logaddexp.reduce(cut / t, axis=1) for t in settings.temperatures], axis=1)
        tail = np.logaddexp(_matrix(row, "tail_logsumexp", *beyond.shape), beyond)
    else:
        with np.errstate(divide="ignore"):
            tail = np.log1p(-np.exp(kept).sum(axis=1, keepdims=True).clip(max=1))
    sampled = settings.tail_samples or None
    return TargetRows(
        ids=entries.ids[:, :k].astype(np.uint32),
        logprobs=kept.astype(np.float32),
        tail_logsumexp=tail.astype(np.float32),
        label_logprob=_label_logprobs(row, labels, entries).astype(np.float32),
        temperatures=settings.temperatures,
        tail_temperature=settings.tail_temperature,
        tail_ids=sampled and _matrix(row, "tail_ids", len(labels), sampled).astype(np.uint32),
        tail_logprobs=sampled and _matrix(row, "tail_logprobs", len(labels), sampled).astype(np.float32),
        log_partition=_list(row, "log_partition", np.float64).astype(np.float32) if "log_partition" in row else None,
    )


def _entries(row: Row, num_targets: int, k: int) -> _Entries:
    lengths, ids = _ragged(row, "target_ids")
    others, logprobs = _ragged(row, "target_logprobs")
    if not len(lengths) == len(others) == num_targets:
        raise ValueError(
            f"it supervises {num_targets} positions and has {len(lengths)} lists of target_ids and {len(others)} of "
            "target_logprobs"
        )
    for wrong, what in ((lengths != others, "as many target_logprobs"), (lengths < k, f"{k} at least")):
        if wrong.any():
            target = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"target {target} has {lengths[target]} ids and {others[target]} log-probs, expected {what}; "
                "leave it out of target_mask, or ask for a smaller k"
            )
    is_given = np.arange(lengths.max()) < lengths[:, None]
    padded = _Entries(np.full(is_given.shape, -1), np.full(is_given.shape, -np.inf))
    padded.ids[is_given], padded.logprobs[is_given] = ids, logprobs
    _require_entries(padded, is_given)
    if (padded.logprobs[:, 1:] <= padded.logprobs[:, :-1]).all():
        return padded  # what is equal as stored stays in the teacher's order
    order = np.lexsort((padded.ids, -padded.logprobs, ~is_given), axis=1)
    return _Entries(np.take_along_axis(padded.ids, order, axis=1), np.take_along_axis(padded.logprobs, order, axis=1))


def _require_entries(entries: _Entries, is_given: npt.NDArray[np.bool_]) -> None:
    ordered = np.sort(np.where(is_given, entries.ids, -1 - np.arange(is_given.shape[1])), axis=1)
    faulty = {
        "ids that repeat": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
        "ids below 0": (is_given & (entries.ids < 0)).any(axis=1),
        "log-probs that are NaN or above 0": ~(entries.logprobs <= 0).all(axis=1),
    }
    _refuse(faulty)


def _matrix(row: Row, name: str, num_targets: int, columns: int) -> Numbers:
    """Return a column of lists of the same length, [target, column]."""
    lengths, values = _ragged(row, name)
    if len(lengths) != num_targets or (lengths != columns).any():
        found = f"lists of {lengths.min()} to {lengths.max()}" if len(lengths) else "lists"
        raise ValueError(f"{name} has {len(lengths)} {found}, expected {num_targets} of {columns}")
    return values.reshape(num_targets, columns)


def _ragged(row: Row, name: str) -> tuple[npt.NDArray[np.int64], Numbers]:
    """Return the lengths of a cell's lists, and all that is in them."""
    if name not in row:
        raise ValueError(f"{name} is empty")
    lists = row[name].values
    lengths, values = pc.list_value_length(lists), lists.flatten()
    if lengths.null_count or values.null_count:
        raise ValueError(f"{name} has an empty entry")
    return np.asarray(lengths, np.int64), np.asarray(values, np.float64)


def _list(row: Row, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    values = row[name].values if name in row else None
    if values is None or values.null_count:
        raise ValueError(f"{name} is empty, or has an empty entry")
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype)


def _label_logprobs(row: Row, labels: npt.NDArray[np.uint32], entries: _Entries) -> Numbers:
    if "label_logprob" in row:
        found = _list(row, "label_logprob", np.float64)
        if len(found) != len(labels):
            raise ValueError(f"label_logprob has {len(found)} entries, expected {len(labels)}")
        return found
    is_label = entries.ids == labels[:, None]
    if not is_label.any(axis=1).all():
        target = int(np.flatnonzero(~is_label.any(axis=1))[0])
        raise ValueError(
            f"the label of target {target}, {labels[target]}, is not among its ids, and there is no label_logprob; "
            "add that column, or the label to the ids (serving engines return its log-prob beside the top k)"
        )
    of_label: Numbers = np.where(is_label, entries.logprobs, -np.inf).max(axis=1)
    return of_label


def _require_possible(targets: TargetRows, labels: npt.NDArray[np.uint32], manifest: Manifest) -> None:
    """Refuse what cannot be true of a teacher, as `todi-cache verify` would of the stored rows."""
    settings = manifest.settings
    stored = decode_rows(
        encode_rows(targets, settings.encoding), settings.encoding, settings.temperatures, settings.tail_temperature
    )
    _refuse(faults(stored, labels, settings.encoding, manifest.vocab_size))


def _refuse(faulty: Mapping[str, npt.NDArray[np.bool_]]) -> None:
    for what, wrong in faulty.items():
        if wrong.any():
            raise ValueError(f"{what}: target {int(np.flatnonzero(wrong)[0])} of it")


@contextlib.contextmanager
def _located(number: int, where: str) -> Iterator[None]:
    """Within, what is wrong with a row says which row it is."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OverflowError, NotImplementedError, TargetsError) as error:
        raise DataError(f"{where}, row {number} (counted from 0): {first_line(error)}") from error
