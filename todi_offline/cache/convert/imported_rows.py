"""A row of a plain table in, a sequence for a cache out; or an error that names the row and its fault."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.check.invariants import SLACK, faults
from todi_offline.cache.convert.cells import Integers, Numbers, Row, read_cell, read_text
from todi_offline.cache.format.encoding import decode_rows, encode_rows
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.errors import DataError, TargetsError

_TAIL_SLACK = 1 / 32
"""The most, in nats, by which an encoding may have rounded a tail up."""


def imported_sequence(number: int, row: Row, where: str, manifest: Manifest) -> SequenceRows:
    """Return row `number` of the table `where` as a sequence, the entries of each target in order.

    Raises:
        DataError: a value is missing, out of range or impossible; names file, row, column and target.
    """
    with _located(number, where):
        ids, mask = _tokens(row, manifest.vocab_size)
        labels = ids[np.flatnonzero(mask) + 1]
        targets = _targets(row, labels, manifest)
        _require_possible(targets, labels, manifest)
        name, source = read_text(row, "id"), read_text(row, "source")
        return SequenceRows(name or str(number), source or "imported", ids.astype(np.uint32), mask, targets)


def _tokens(row: Row, vocab_size: int) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Return the tokens and the mask of a row."""
    ids = read_cell(row, "input_ids").ids(vocab_size)
    mask = read_cell(row, "target_mask").mask() if "target_mask" in row or "positions" not in row else None
    if "positions" in row:
        of_positions = _mask_of(row, len(ids))
        if mask is not None and not np.array_equal(mask, of_positions):
            raise ValueError("the columns target_mask and positions contradict each other; keep one of them")
        mask = of_positions
    assert mask is not None, "a row without positions has a mask, or is refused"
    if ids.shape != mask.shape or not mask.any() or mask[-1]:
        raise ValueError(
            f"the row has {ids.size} input_ids and {mask.size} entries of target_mask, {int(mask.sum())} of them true; "
            "expected the same number, at least one true, and the last one false, because no token follows it"
        )
    return ids, mask


def _mask_of(row: Row, length: int) -> npt.NDArray[np.bool_]:
    positions = read_cell(row, "positions").values
    is_rising = len(positions) < 2 or (positions[1:] > positions[:-1]).all()
    if not is_rising or ((positions < 0) | (positions >= length)).any():
        raise ValueError(f"column positions: expected rising numbers from 0 to {length - 2}, each once")
    mask = np.zeros(length, np.bool_)
    mask[positions.astype(np.int64)] = True
    return mask


def _targets(row: Row, labels: Integers, manifest: Manifest) -> TargetRows:
    settings, k = manifest.settings, manifest.settings.k
    entries = _entries(row, len(labels), manifest)
    kept, cut = entries.logprobs[:, :k], entries.logprobs[:, k:]
    if cut.shape[1] and settings.tail_samples:
        raise ValueError(
            f"k is {k}, but the samples are of the ids beyond the {entries.ids.shape[1]} entries of a target; import "
            f"all entries, with k = {entries.ids.shape[1]}"
        )
    tail_ids, tail_logprobs = _samples(row, len(labels), manifest)
    log_partition = None
    if "log_partition" in row:
        cell = read_cell(row, "log_partition")
        cell.require_targets(len(labels))
        log_partition = cell.finite().astype(np.float32)
    return TargetRows(
        ids=entries.ids[:, :k].astype(np.uint32),
        logprobs=kept.astype(np.float32),
        tail_logsumexp=_tail(row, kept, cut, manifest).astype(np.float32),
        label_logprob=_label_logprobs(row, labels, entries).astype(np.float32),
        temperatures=settings.temperatures,
        tail_temperature=settings.tail_temperature,
        tail_ids=tail_ids,
        tail_logprobs=tail_logprobs,
        log_partition=log_partition,
    )


def _tail(row: Row, kept: Numbers, cut: Numbers, manifest: Manifest) -> Numbers:
    """Return the tail [target, temperature]: the row's tail and the entries that are cut; or 1 less the kept mass."""
    temperatures = manifest.settings.temperatures
    if "tail_logsumexp" not in row:
        if temperatures != (1.0,):
            raise ValueError("column tail_logsumexp: the cell is empty, and only temperature 1 allows that; fill it")
        with np.errstate(divide="ignore"):
            left: Numbers = np.log1p(-np.exp(kept).sum(axis=1, keepdims=True).clip(max=1))
        return left
    cell = read_cell(row, "tail_logsumexp")
    given = cell.logprobs(most=float(np.log(manifest.vocab_size)) + _TAIL_SLACK)  # every id adds 1 at most
    beyond = np.stack([np.logaddexp.reduce(cut / t, axis=1) for t in temperatures], axis=1)
    tail: Numbers = np.logaddexp(cell.rows(given, *beyond.shape), beyond)
    return tail


def _samples(
    row: Row, num_targets: int, manifest: Manifest
) -> tuple[npt.NDArray[np.uint32] | None, npt.NDArray[np.float32] | None]:
    if not (samples := manifest.settings.tail_samples):
        return None, None
    ids, logprobs = read_cell(row, "tail_ids"), read_cell(row, "tail_logprobs")
    return (
        ids.rows(ids.ids(manifest.vocab_size), num_targets, samples).astype(np.uint32),
        logprobs.rows(logprobs.logprobs(), num_targets, samples).astype(np.float32),
    )


@dataclass(frozen=True, slots=True)
class _Entries:
    """All entries of a row, the most probable first; short targets are padded with id -1 and log-prob -inf."""

    ids: Integers
    """[target, entry]"""
    logprobs: Numbers


def _entries(row: Row, num_targets: int, manifest: Manifest) -> _Entries:
    if not manifest.settings.k and "target_ids" not in row:
        return _Entries(np.empty((num_targets, 0), np.int64), np.empty((num_targets, 0)))
    ids, logprobs, k = read_cell(row, "target_ids"), read_cell(row, "target_logprobs"), manifest.settings.k
    for cell in (ids, logprobs):
        cell.require_targets(num_targets)
    for wrong, expected in (
        (ids.lengths != logprobs.lengths, "one log-prob for each id"),
        (ids.lengths < k, f"at least {k}"),
    ):
        if wrong.any():
            target = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"column target_ids: target {target} has {ids.lengths[target]} ids and {logprobs.lengths[target]} "
                f"log-probs; expected {expected}; leave the target out of target_mask, or import with a smaller k"
            )
    is_given = np.arange(ids.lengths.max()) < ids.lengths[:, None]
    padded = _Entries(np.full(is_given.shape, -1), np.full(is_given.shape, -np.inf))
    padded.ids[is_given], padded.logprobs[is_given] = ids.ids(manifest.vocab_size), logprobs.logprobs()
    ordered = np.sort(np.where(is_given, padded.ids, -1 - np.arange(is_given.shape[1])), axis=1)
    _refuse({"ids repeat": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)})
    if (padded.logprobs[:, 1:] <= padded.logprobs[:, :-1]).all():
        return padded  # equal log-probs keep the teacher's order
    order = np.lexsort((padded.ids, -padded.logprobs, ~is_given), axis=1)
    return _Entries(np.take_along_axis(padded.ids, order, axis=1), np.take_along_axis(padded.logprobs, order, axis=1))


def _label_logprobs(row: Row, labels: Integers, entries: _Entries) -> Numbers:
    if "label_logprob" in row:
        cell = read_cell(row, "label_logprob")
        cell.require_targets(len(labels))
        return cell.logprobs(most=SLACK)
    is_label = entries.ids == labels[:, None]
    if not is_label.any(axis=1).all():
        target = int(np.flatnonzero(~is_label.any(axis=1))[0])
        raise ValueError(
            f"target {target} lacks its label, id {labels[target]}, and there is no column label_logprob; add that "
            "column, or add the label to the ids (serving engines return its log-prob beside the top k)"
        )
    of_label: Numbers = np.where(is_label, entries.logprobs, -np.inf).max(axis=1)
    return of_label


def _require_possible(targets: TargetRows, labels: Integers, manifest: Manifest) -> None:
    """Refuse targets that no teacher can have: those in which `todi-cache verify` would find a fault."""
    settings: CacheSettings = manifest.settings
    stored = decode_rows(
        encode_rows(targets, settings.encoding), settings.encoding, settings.temperatures, settings.tail_temperature
    )
    _refuse(faults(stored, labels.astype(np.uint32), settings.encoding, manifest.vocab_size))


def _refuse(faulty: Mapping[str, npt.NDArray[np.bool_]]) -> None:
    for fault, wrong in faulty.items():
        if wrong.any():
            raise ValueError(f"target {int(np.flatnonzero(wrong)[0])}: {fault}")


@contextlib.contextmanager
def _located(number: int, where: str) -> Iterator[None]:
    """Within this context, an error names the file and the row."""
    try:
        yield
    except (ValueError, TargetsError, DataError) as error:
        raise DataError(f"{where}, row {number} (counted from 0), {error}") from error
