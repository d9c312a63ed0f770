"""Rows of float32 log-probs in, the numbers that are stored out, and back.

`f16` keeps log-probs in half precision: |error| <= 2^-11 |log-prob| (and 2^-25 near 0).

`q8` keeps steps of 1/16 nat between neighbours of a row, one byte each, the first counted from 0. The rounding is
done on the running sum, so errors do not add up: |error| <= 1/32 nat, except past a gap of more than 255/16 nats,
where what is stored is the smaller log-prob's upper bound, so both it and the truth are below exp(-15.9) = 1.2e-7
of the entry before it. Rows must fall from left to right, which the order of the kept entries ensures.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Q8_STEPS_PER_NAT = 16
_Q8_MAX_STEP = 255

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Teacher targets of consecutive supervised positions, as numpy arrays; natural logs throughout.

    The fields are those of `todi_offline.targets.SparseTargets`, and the label's log-prob.
    """

    ids: npt.NDArray[np.unsignedinteger]
    """[target, k], the most probable first."""
    logprobs: npt.NDArray[np.float32]
    """[target, k], at temperature 1 over the whole vocabulary."""
    tail_logsumexp: npt.NDArray[np.float32]
    """[target, temperature]: log of the sum of exp(logprob / T) over the ids that are not kept."""
    label_logprob: npt.NDArray[np.float32]
    """[target]: the teacher's log-prob of the token that follows."""
    temperatures: tuple[float, ...]
    tail_temperature: float = 1.0
    tail_ids: npt.NDArray[np.unsignedinteger] | None = None
    """[target, sample], drawn with replacement from the ids that are not kept."""
    tail_logprobs: npt.NDArray[np.float32] | None = None
    """[target, sample], at temperature 1 over the whole vocabulary."""

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.ids)

    def __getitem__(self, index: slice) -> "TargetRows":
        """Return some of the targets."""
        cut: dict[str, Any] = {name: values[index] for name, values in self.arrays().items()}
        return dataclasses.replace(self, **cut)

    def arrays(self) -> dict[str, Array]:
        """Return the fields that are arrays, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    @staticmethod
    def concatenate(parts: Sequence["TargetRows"]) -> "TargetRows":
        """Return the targets of several, end to end; all have the same fields and settings."""
        names = parts[0].arrays()
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(parts[0], **joined)


def encode_logprobs(logprobs: npt.NDArray[np.float32], encoding: str) -> Array:
    """Encode log-probs [target, k] that fall along each row."""
    if encoding == "f16":
        return _as_f16(logprobs)
    steps = np.rint(np.minimum(-logprobs, 1e6) * Q8_STEPS_PER_NAT).astype(np.int64)
    stored = np.empty(steps.shape, np.uint8)
    reached = np.zeros(len(steps), np.int64)
    for column in range(steps.shape[1]):
        stored[:, column] = np.clip(steps[:, column] - reached, 0, _Q8_MAX_STEP)
        reached += stored[:, column]
    return stored


def decode_logprobs(stored: Array, encoding: str) -> npt.NDArray[np.float32]:
    """Return what `encode_logprobs` stored as float32 log-probs [target, k]."""
    if encoding == "f16":
        return stored.astype(np.float32)
    return np.cumsum(stored, axis=1, dtype=np.int32).astype(np.float32) / np.float32(-Q8_STEPS_PER_NAT)


def logprob_bounds(
    logprobs: npt.NDArray[np.float32], encoding: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the least and the greatest log-prob that each of these, as decoded [target, k], can stand for."""
    values = logprobs.astype(np.float64)
    if encoding == "f16":
        error = np.where(np.isfinite(values), np.abs(values) * 2.0**-11 + 2.0**-25, 0)
        return values - error, np.where(np.isneginf(values), -65504, values + error)
    half_step = 0.5 / Q8_STEPS_PER_NAT
    gaps = -np.diff(values, axis=1, prepend=0)
    only_above = np.maximum.accumulate(gaps >= _Q8_MAX_STEP / Q8_STEPS_PER_NAT, axis=1)
    return np.where(only_above, -np.inf, values - half_step), values + half_step


def encode_rows(rows: TargetRows, encoding: str) -> dict[str, Array]:
    """Return the arrays of the target axis by their stored names."""
    arrays: dict[str, Array] = {
        "topk_ids": rows.ids,
        "topk_logprobs": encode_logprobs(rows.logprobs, encoding),
        "tail_logsumexp": rows.tail_logsumexp,
        "label_logprob": rows.label_logprob,
    }
    if rows.tail_ids is not None and rows.tail_logprobs is not None:
        arrays |= {"tail_ids": rows.tail_ids, "tail_logprobs": _as_f16(rows.tail_logprobs)}
    return arrays


def decode_rows(
    arrays: dict[str, Array], encoding: str, temperatures: tuple[float, ...], tail_temperature: float
) -> TargetRows:
    """Return what `encode_rows` made as rows."""
    tail = arrays.get("tail_logprobs")
    return TargetRows(
        ids=arrays["topk_ids"],  # type: ignore[arg-type]
        logprobs=decode_logprobs(arrays["topk_logprobs"], encoding),
        tail_logsumexp=arrays["tail_logsumexp"],  # type: ignore[arg-type]
        label_logprob=arrays["label_logprob"],  # type: ignore[arg-type]
        temperatures=temperatures,
        tail_temperature=tail_temperature,
        tail_ids=arrays.get("tail_ids"),  # type: ignore[arg-type]
        tail_logprobs=None if tail is None else tail.astype(np.float32),
    )


def _as_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # below -65504 nats a probability is 0 in any precision
        return values.astype(np.float16)
