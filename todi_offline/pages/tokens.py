"""Sequences and a student's predictions in, the token view of a page out.

A prediction is shown at the token that it predicts: the models' output at position t colours token t + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.pages.blocks import Block
from todi_offline.pages.gate import FLOOR, Values, divide, entropy_bound, gate, teacher_entries
from todi_offline.pages.texts import TokenTexts

TEACHER_ENTRIES = 8
STUDENT_ENTRIES = 5
"""Ids shown at a target: the teacher's likeliest, then the student's likeliest that are not among these."""

BYTES_PER_TOKEN = 7.0
BYTES_PER_TARGET = {False: 45.0, True: 130.0}
"""Bytes in the file, with a student (True) and without; measured with a real teacher, right to a fifth."""


@dataclass(frozen=True, slots=True)
class StudentRows:
    """What a student predicts at the targets of a sequence, as log-probs at the temperature of the view."""

    kept: Values
    """[target, k]: of the ids that the teacher kept."""
    tail: Values
    """[target]: of all others together."""
    label: Values
    """[target]"""
    nll: Values
    """[target]: of the label, at temperature 1."""
    entropy: Values
    """[target]"""
    top_ids: npt.NDArray[np.int64]
    """[target, entry]: the student's own likeliest ids."""
    top: Values
    """[target, entry]: their log-probs."""


@dataclass(frozen=True, slots=True)
class ShownSequence:
    """A sequence of the view."""

    number: int
    """In the cache."""
    id: str
    source: str
    why: str
    sequence: CachedSequence
    student: StudentRows | None


@dataclass(frozen=True, slots=True)
class _Measure:
    """The name and the words for a number of each target; `middle` is the neutral value of a two-sided one."""

    name: str
    label: str
    note: str
    middle: float | None = None


_TEACHER_MEASURES = (
    _Measure("teacher_nll", "teacher NLL", "how much this token surprises the teacher: -log probability, in nats"),
    _Measure("teacher_entropy", "teacher entropy", "how undecided the teacher is here, in nats: a lower bound"),
    _Measure("tail", "teacher tail", "the probability that the teacher gives to all ids that the cache does not keep"),
)
_STUDENT_MEASURES = (
    _Measure("label_gate", "gate at the token", "ToDi's gate a at this token: which model thinks it likelier", 0.5),
    _Measure(
        "mean_gate", "mean gate", "a at all ids, weighted by the teacher's probability: 0.5 where they agree", 0.5
    ),
    _Measure("forward_kl", "KL(teacher ‖ student)", "in nats; all ids that the cache does not keep count as one"),
    _Measure("reverse_kl", "KL(student ‖ teacher)", "in nats; all ids that the cache does not keep count as one"),
    _Measure("todi", "ToDi", "the divergence, in nats; all ids that the cache does not keep count as one"),
    _Measure("student_nll", "student NLL", "how much this token surprises the student: -log probability, in nats"),
    _Measure("student_entropy", "student entropy", "how undecided the student is here, in nats"),
    *_TEACHER_MEASURES,
)


def token_block(shown: Sequence[ShownSequence], texts: TokenTexts, *, temperature: float, beta: float) -> Block:
    """Return the view of some sequences; the student has read all of them, or none."""
    targets = [_target_arrays(item.sequence, item.student, temperature, beta) for item in shown]
    joined = {name: np.concatenate([arrays[name] for arrays in targets]) for name in targets[0]}
    ids = np.concatenate([item.sequence.token_ids for item in shown]).astype(np.int64)
    entry_ids = joined.pop("entry_ids")
    vocabulary = np.unique(np.concatenate([ids, entry_ids[entry_ids >= 0]]))
    measures = _TEACHER_MEASURES if shown[0].student is None else _STUDENT_MEASURES
    return {
        "kind": "tokens",
        "temperature": temperature,
        "beta": beta,
        "has_student": shown[0].student is not None,
        "measures": [_described(measure, joined[measure.name]) for measure in measures],
        "vocabulary": {"ids": vocabulary.astype(np.uint32), "texts": list(map(texts.of_id, vocabulary.tolist()))},
        "ids": _smallest(np.searchsorted(vocabulary, ids)),
        "labels": _smallest(np.concatenate([np.flatnonzero(item.sequence.target_mask) + 1 for item in shown])),
        "entry_ids": _smallest(np.where(entry_ids < 0, len(vocabulary), np.searchsorted(vocabulary, entry_ids))),
        **{name: _rounded(values) for name, values in joined.items()},
        "sequences": [_described_sequence(item, texts) for item in shown],
    }


def _target_arrays(
    sequence: CachedSequence, student: StudentRows | None, temperature: float, beta: float
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a sequence's targets: measures [target], entries and sums of the others [target, ...]."""
    rows = sequence.targets
    kept, tail, label = teacher_entries(rows, temperature)
    ids = rows.ids.astype(np.int64)
    width = min(TEACHER_ENTRIES, ids.shape[1])
    teacher = {
        "teacher_nll": -rows.label_logprob.astype(np.float64),
        "teacher_entropy": entropy_bound(kept, tail),
        "tail": np.exp(tail),
    }
    if student is None:
        rest = np.stack([np.exp(kept[:, width:]).sum(1), np.exp(tail)], axis=1)
        return {**teacher, "entry_ids": ids[:, :width], "entry_p": kept[:, :width], "rest_p": rest}
    parts = divide(np.column_stack([kept, tail]), np.column_stack([student.kept, student.tail]), beta)
    return {
        **teacher,
        "label_gate": gate(label, student.label, beta),
        "mean_gate": parts.mean_gate,
        "forward_kl": parts.forward_kl,
        "reverse_kl": parts.reverse_kl,
        "todi": parts.todi.sum(1),
        "student_nll": student.nll,
        "student_entropy": student.entropy,
        **_entries(ids, kept, tail, student, parts.todi, width),
    }


def _entries(
    ids: npt.NDArray[np.int64], kept: Values, tail: Values, student: StudentRows, parts: Values, width: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the entries of both models: the teacher's ids, then the student's own, then two sums.

    The sums are over the other kept ids and over the tail. An id of the student's that the teacher did not keep belongs
    to the tail: the teacher's probability of it is unknown, and so is its part of the divergence.
    """
    own_ids, own = _student_only(student, ids[:, :width])
    found = np.full((len(ids), ids.shape[1] + 1), -1)
    place = _places(ids, own_ids)
    found[:, :-1] = np.where(np.arange(ids.shape[1]) < width, 0, 1)  # 0: shown, 1: among the other kept ids
    rows_of, columns = np.nonzero(place >= 0)
    found[rows_of, place[rows_of, columns]] = 0

    def of_own(values: Values) -> Values:
        taken = np.take_along_axis(values, np.maximum(place, 0), axis=1)
        return np.where(place >= 0, taken, np.nan)

    def rest(values: Values) -> Values:
        return np.stack([np.where(found[:, :-1] == 1, values[:, :-1], 0).sum(1), values[:, -1]], axis=1)

    return {
        "entry_ids": np.concatenate([ids[:, :width], own_ids], axis=1),
        "entry_p": np.concatenate([kept[:, :width], of_own(kept)], axis=1),
        "entry_q": np.concatenate([student.kept[:, :width], own], axis=1),
        "entry_part": np.concatenate([parts[:, :width], of_own(parts[:, :-1])], axis=1),
        "rest_p": rest(np.exp(np.column_stack([kept, tail]))),
        "rest_q": rest(np.exp(np.column_stack([student.kept, student.tail]))),
        "rest_part": rest(parts),
    }


def _student_only(student: StudentRows, shown: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Values]:
    """Return the student's likeliest ids that are not shown yet, and their log-probs; -1 stands for no id."""
    is_new = (student.top_ids[:, :, None] != shown[:, None, :]).all(axis=2)
    order = np.argsort(~is_new, axis=1, kind="stable")[:, :STUDENT_ENTRIES]
    ids, logprobs, new = (
        np.take_along_axis(values, order, axis=1) for values in (student.top_ids, student.top, is_new)
    )
    return np.where(new, ids, -1), np.where(new, logprobs, np.nan)


def _places(ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the column of `ids` that has each wanted id, or -1."""
    equal = ids[:, None, :] == wanted[:, :, None]
    return np.where(equal.any(axis=2), equal.argmax(axis=2), -1)


def _described(measure: _Measure, values: Values) -> dict[str, Any]:
    far = 1.0 if measure.middle is not None else _round_up(float(np.percentile(values, 95)))
    return {"name": measure.name, "label": measure.label, "note": measure.note, "middle": measure.middle, "far": far}


def _round_up(value: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(f"{next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999999):.6g}")


def _described_sequence(item: ShownSequence, texts: TokenTexts) -> dict[str, Any]:
    pieces = texts.pieces(item.sequence.token_ids.tolist())
    return {
        "number": item.number,
        "id": item.id,
        "source": item.source,
        "why": item.why,
        "num_tokens": len(item.sequence.token_ids),
        "num_targets": len(item.sequence.targets),
        "pieces": [piece.text for piece in pieces],
        "lengths": np.array([piece.num_tokens for piece in pieces], np.uint8),
    }


def _smallest(numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return whole numbers in the fewest bytes that hold them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _rounded(values: Values) -> npt.NDArray[np.float32]:
    """Return numbers exact to one part in 4,096: more bits would not compress, and nobody sees them."""
    bits = np.maximum(values, FLOOR).astype(np.float32).view(np.uint32)
    is_number = ~np.isnan(values)
    return np.where(is_number, (bits + 0x800) & 0xFFFFF000, 0x7FC00000).astype(np.uint32).view(np.float32)
