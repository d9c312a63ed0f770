"""A plain Parquet table in, from whatever made it, a cache out."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.encoding import TargetRows, decode_rows, encode_rows
from todi_offline.cache.export import PLAIN_SCHEMA
from todi_offline.cache.fingerprint import content_key, hash_bytes
from todi_offline.cache.invariants import faults
from todi_offline.cache.layout import MANIFEST_KEY, TOKENIZER_KEY, CacheSettings
from todi_offline.cache.manifest import Manifest, Part
from todi_offline.cache.plan import plan_shards
from todi_offline.cache.writer import CacheWriter, SequenceRows
from todi_offline.errors import CacheFormatError, DataError, first_line

_NEEDED = ("input_ids", "target_mask", "target_ids", "target_logprobs")
_BATCH_ROWS = 64


def import_table(
    path: Path, out: str, described: Manifest | None = None, tokenizer_json: str | None = None
) -> Manifest:
    """Write a cache of the rows of a plain table (see `export_cache`); return its manifest.

    A table that `export_cache` wrote brings its own description; `described` is that of any other (its part is made
    here). Needed are input_ids, target_mask, target_ids and target_logprobs; the entries of a target may stand in any
    order. Without tail_logsumexp, the tail's is log(1 - sum of the kept) at temperature 1, in double precision: what
    the log-probs were rounded by, it is off by in all. Without label_logprob, labels must be among the kept ids.
    The same call again goes on where it was stopped.

    Raises:
        DataError: the table cannot be read, is not described, or has a wrong row, which is named.
        CacheError: `out` cannot be written or holds something else.
    """
    try:
        with pq.ParquetFile(path) as table:
            own, tokenizer = _metadata(table, str(path))
            if (described := described or own) is None:
                raise DataError(f"{path} brings no manifest; say its teacher, tokenizer and settings")
            _require_columns(table, described.settings, str(path))
            return _write(table, str(path), out, described, tokenizer_json or tokenizer)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def imported_manifest(settings: CacheSettings, vocab_size: int, teacher: str, tokenizer: Mapping[str, str]) -> Manifest:
    """Describe targets from elsewhere: of their teacher, a name is all that is known."""
    fingerprint = {"model_type": "imported", "name": teacher}
    part = Part(recipe={"source": "imported"}, content="", num_sequences=1, num_shards=1, versions={})
    return Manifest(settings=settings, vocab_size=vocab_size, teacher=fingerprint, tokenizer=tokenizer, parts=(part,))


def _write(table: pq.ParquetFile, where: str, out: str, described: Manifest, tokenizer_json: str | None) -> Manifest:
    examples = [_tokens(number, row, where) for number, row in _rows(table, ["input_ids", "target_mask"])]
    plan = plan_shards([len(ids) for ids, _ in examples], described.settings.shard_tokens)
    content = hash_bytes(content_key(*example) for example in examples)
    part = dataclasses.replace(described.parts[0], content=content, num_sequences=len(examples), num_shards=len(plan))
    manifest = dataclasses.replace(described, parts=(part,))
    rows = _rows(table, [name for name in PLAIN_SCHEMA.names if name in table.schema_arrow.names])
    with CacheWriter(out, manifest, tokenizer_json) as writer:
        missing = set(writer.missing_shards())
        for shard in plan:
            members = [next(rows) for _ in shard.examples]
            if shard.index in missing:
                sequences = [_sequence(number, row, where, manifest) for number, row in members]
                writer.write_shard(shard.index, sequences)
        if not writer.sealed:
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
    needed = [*_NEEDED, *(["tail_ids", "tail_logprobs"] if settings.tail_samples else [])]
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(names)}")
    if "tail_logsumexp" not in names and settings.temperatures != (1.0,):
        raise DataError(
            f"{where} has no tail_logsumexp, so temperature 1 is all that can be had of it, not "
            f"{', '.join(f'{t:g}' for t in settings.temperatures)}; ask for temperature 1 alone"
        )


def _rows(table: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in table.iter_batches(_BATCH_ROWS, columns=list(columns)):
        for row in batch.to_pylist():
            yield number, row
            number += 1


def _tokens(number: int, row: dict[str, Any], where: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """Return the tokens and the mask of a row."""
    with _located(number, where):
        ids, mask = np.array(row["input_ids"], np.int64), np.array(row["target_mask"], np.bool_)
        if ids.ndim != 1 or ids.shape != mask.shape or not mask.any() or mask[-1]:
            raise ValueError(
                f"it has {ids.size} input_ids and {mask.size} entries of target_mask, {int(mask.sum())} of them true; "
                "expected as many, one true at least and the last one false, for no token follows it"
            )
        if (ids < 0).any():
            raise ValueError(f"it has the token id {ids.min()}")
        return ids.astype(np.uint32), mask


def _sequence(number: int, row: dict[str, Any], where: str, manifest: Manifest) -> SequenceRows:
    """Return a row as a sequence, its entries in order."""
    ids, mask = _tokens(number, row, where)
    with _located(number, where):
        labels = ids[np.flatnonzero(mask) + 1]
        targets = _targets(row, labels, manifest.settings)
        if (ids >= manifest.vocab_size).any():
            raise ValueError(f"it has the token id {ids.max()}, beyond the vocabulary of {manifest.vocab_size}")
        _require_possible(targets, labels, manifest)
    return SequenceRows(row.get("id") or str(number), row.get("source") or "imported", ids, mask, targets)


def _targets(row: dict[str, Any], labels: npt.NDArray[np.uint32], settings: CacheSettings) -> TargetRows:
    logprobs, ids = _matrix(row, "target_logprobs", settings.k), _matrix(row, "target_ids", settings.k)
    if len(logprobs) != len(labels) or len(ids) != len(labels):
        raise ValueError(f"it supervises {len(labels)} positions and has {len(ids)} targets")
    order = np.argsort(-logprobs, axis=1, kind="stable")  # what is equal stays in the teacher's order
    ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    if row.get("tail_logsumexp") is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = np.log1p(-np.exp(logprobs).sum(axis=1, keepdims=True).clip(max=1))
    else:
        tail = _matrix(row, "tail_logsumexp", len(settings.temperatures))
    sampled = settings.tail_samples > 0
    return TargetRows(
        ids=ids.astype(np.uint32),
        logprobs=logprobs.astype(np.float32),
        tail_logsumexp=tail.astype(np.float32),
        label_logprob=_label_logprobs(row, labels, ids, logprobs).astype(np.float32),
        temperatures=settings.temperatures,
        tail_temperature=settings.tail_temperature,
        tail_ids=_matrix(row, "tail_ids", settings.tail_samples).astype(np.uint32) if sampled else None,
        tail_logprobs=_matrix(row, "tail_logprobs", settings.tail_samples).astype(np.float32) if sampled else None,
    )


def _matrix(row: dict[str, Any], name: str, columns: int) -> npt.NDArray[np.float64]:
    """Return a column of lists as [target, columns]; what is beyond is cut off."""
    lengths = [len(entries) for entries in row[name]]
    if min(lengths, default=columns) < columns:
        raise ValueError(f"{name} of target {int(np.argmin(lengths))} has {min(lengths)} entries, expected {columns}")
    if name in ("target_ids", "target_logprobs") and max(lengths, default=columns) > columns:
        raise ValueError(f"{name} has {max(lengths)} entries a target; ask for k = {max(lengths)}, or cut it yourself")
    return np.array([entries[:columns] for entries in row[name]], np.float64).reshape(len(lengths), columns)


def _label_logprobs(
    row: dict[str, Any], labels: npt.NDArray[np.uint32], ids: npt.NDArray[Any], logprobs: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    if row.get("label_logprob") is not None:
        return np.array(row["label_logprob"], np.float64)
    kept = ids == labels[:, None]
    if not kept.any(axis=1).all():
        target = int(np.flatnonzero(~kept.any(axis=1))[0])
        raise ValueError(
            f"the label of target {target}, {labels[target]}, is not among its kept ids, and there is no "
            "label_logprob; add that column (serving engines return it as the prompt's own log-prob)"
        )
    found: npt.NDArray[np.float64] = np.where(kept, logprobs, -np.inf).max(axis=1)
    return found


def _require_possible(targets: TargetRows, labels: npt.NDArray[np.uint32], manifest: Manifest) -> None:
    """Refuse what cannot be true of a teacher, as `todi-cache verify` would of the stored rows."""
    settings = manifest.settings
    stored = decode_rows(
        encode_rows(targets, settings.encoding), settings.encoding, settings.temperatures, settings.tail_temperature
    )
    for what, wrong in faults(stored, labels, settings.encoding, manifest.vocab_size).items():
        if wrong.any():
            raise ValueError(f"{what}: target {int(np.flatnonzero(wrong)[0])} of it")


@contextlib.contextmanager
def _located(number: int, where: str) -> Iterator[None]:
    """Within, what is wrong with a row says which row it is."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}, row {number} (counted from 0): {error}") from error
