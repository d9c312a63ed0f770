"""Rows of float32 log-probs in, the numbers that a cache stores out, and back.

`f16` keeps log-probs in half precision: |error| <= 2^-11 |log-prob| (and 2^-25 near 0).

`q8` keeps steps of 1/16 nat between neighbours of a row, one byte each, the first counted from 0. It rounds the
running sum, so errors do not add up: |error| <= 1/32 nat, except past a gap of more than 255/16 nats. There the stored
number is an upper bound of the smaller log-prob, so the bound and the truth are both below exp(-15.9) = 1.2e-7 of the
entry before. Rows must fall from left to right; the order of the kept entries ensures that.

`bf16_logit` keeps the bits of the bfloat16 logits that the teacher's head made, and the row's log-partition in float32.
It loses only the rounding of float32: |error| <= 1e-4 nat. Logits that are no bfloat16 numbers are refused.

In these three encodings the sums of the tail and the label's log-prob are float32; log-probs of samples are as in
`f16`.

`root8` takes the fewest bytes. It rounds to the nearest:

- A kept probability p is one byte, c = 128 p^(1/4), so p^(1/4) is off by at most 1/256: in nats, 1/63 at p = 1, 1/19 at
  0.01, 1/6 at 10^-4. With it a row loses a forward KL of about 4e-5 times the sum of the square roots of its kept
  probabilities, which is at most sqrt(k), and never more than 1.3e-4 times that sum and 1e-8 for each of them.
  c = 0 stands for all p below 2.4e-10 and is read as 1.5e-11.
- Other numbers are rounded to steps: sums of the tail to 1/32 nat and the label's log-prob to 1/16, both in int16;
  log-probs of samples to 1/4, in int8. |error| is at most half a step. The least integer is the log of 0; the next
  one stands for all numbers below it (-1,023.97, -2,047.9 and -31.75 nats).

`root8` and `bf16_logit` store a row by rising id, because the stored log-probs tell their order. The row comes back by
falling log-prob and, among equal ones, by rising id. So the first columns are the most probable ids, up to rounding.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.rows import Array, TargetRows
from todi_offline.errors import TargetsError

Q8_STEPS_PER_NAT = 16
_Q8_MAX_STEP = 255
_ROOT8_ONE = 128  # stands for the probability 1
_STEPS: dict[str, tuple[int, Any]] = {
    "tail_logsumexp": (32, np.int16),
    "label_logprob": (16, np.int16),
    "tail_logprobs": (4, np.int8),
}
"""For `root8`: the steps of a nat, and the dtype that stores them."""
_BF16_ERROR = 1e-4
_FLIPS = np.array([0xFFFF, 0x8000], np.uint16)  # of bits, for floats below 0 and others: they then sort as integers
BY_ID = ("bf16_logit", "root8")
"""Encodings that store a row by rising id."""

Bounds = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""The least and the greatest number that each decoded one can stand for."""


def encode_logprobs(logprobs: npt.NDArray[np.float32], encoding: str) -> Array:
    """Encode log-probs [target, k] that fall along each row, as `f16`, `q8` or `root8`."""
    if encoding == "f16":
        return _as_f16(logprobs)
    if encoding == "root8":
        scaled: Array = np.rint(_ROOT8_ONE * np.exp(logprobs.astype(np.float64) / 4))
        return scaled.astype(np.uint8)
    steps = np.rint(np.minimum(-logprobs, 1e6) * Q8_STEPS_PER_NAT).astype(np.int64)
    stored = np.empty(steps.shape, np.uint8)
    reached = np.zeros(len(steps), np.int64)
    for column in range(steps.shape[1]):
        stored[:, column] = np.clip(steps[:, column] - reached, 0, _Q8_MAX_STEP)
        reached += stored[:, column]
    return stored


def decode_logprobs(stored: Array, encoding: str) -> npt.NDArray[np.float32]:
    """Return float32 log-probs [target, k] from the numbers that `encode_logprobs` made."""
    if encoding == "f16":
        return np.asarray(stored, np.float32)
    if encoding == "root8":
        return _ROOT8_LOGPROBS[stored]
    return np.cumsum(stored, axis=1, dtype=np.int32).astype(np.float32) / np.float32(-Q8_STEPS_PER_NAT)


_ROOT8_LOGPROBS = (4 * np.log(np.maximum(np.arange(256), 0.25) / _ROOT8_ONE)).astype(np.float32)


def logprob_bounds(logprobs: npt.NDArray[np.float32], encoding: str) -> Bounds:
    """Return the least and the greatest log-prob that each decoded one [target, k] can stand for.

    A cache in a coarser encoding may come from one in half precision, so the bounds include that rounding too.
    """
    values = logprobs.astype(np.float64)
    if encoding == "bf16_logit":
        return values - _BF16_ERROR, values + _BF16_ERROR
    lower, upper = (values, values) if encoding == "f16" else _coarse_bounds(values, encoding)
    error = np.where(np.isfinite(values), np.abs(values) * 2.0**-11 + 2.0**-25, 0)
    upper = np.where(np.isneginf(values), -65504, upper + error) if encoding == "f16" else upper + error
    return lower - error, upper


def _coarse_bounds(values: npt.NDArray[np.float64], encoding: str) -> Bounds:
    if encoding == "root8":
        stored = np.rint(_ROOT8_ONE * np.exp(values / 4))
        with np.errstate(divide="ignore"):
            lower, upper = (4 * np.log(np.maximum(stored + half, 0) / _ROOT8_ONE) for half in (-0.5, 0.5))
        return lower, upper
    half_step = 0.5 / Q8_STEPS_PER_NAT
    gaps = -np.diff(values, axis=1, prepend=0)
    only_above = np.maximum.accumulate(gaps >= _Q8_MAX_STEP / Q8_STEPS_PER_NAT, axis=1)
    return np.where(only_above, -np.inf, values - half_step), values + half_step


@np.errstate(all="ignore")  # verify reports NaN, so numpy need not warn of it
def bounds(rows: TargetRows, encoding: str) -> dict[str, Bounds]:
    """Return the bounds of the numbers of decoded rows, by field."""
    found = {"logprobs": logprob_bounds(rows.logprobs, encoding)}
    others = {name: values for name, values in rows.arrays().items() if name in _STEPS}
    for name, values in others.items():
        if encoding == "root8":
            found[name] = _step_bounds(values.astype(np.float64), *_STEPS[name])
        elif name == "tail_logprobs":
            found[name] = logprob_bounds(values.astype(np.float32), "f16")
        else:
            found[name] = (values.astype(np.float64), values.astype(np.float64))
    return found


def encode_rows(rows: TargetRows, encoding: str) -> dict[str, Array]:
    """Return the arrays of the target axis by their stored names.

    Raises:
        TargetsError: a number is NaN or +inf; or the encoding is `bf16_logit` and the logits are unknown or no bfloat16
            numbers.
    """
    _require_numbers(rows)
    if encoding in BY_ID:
        order = np.argsort(rows.ids, axis=1)
        rows = dataclasses.replace(
            rows,
            ids=np.take_along_axis(rows.ids, order, axis=1),
            logprobs=np.take_along_axis(rows.logprobs, order, axis=1),
        )
    arrays: dict[str, Array] = {}
    if rows.ids.shape[1]:
        is_bf16 = encoding == "bf16_logit"
        arrays["topk_ids"] = rows.ids
        arrays |= _bf16_logits(rows) if is_bf16 else {"topk_logprobs": encode_logprobs(rows.logprobs, encoding)}
    others = {name: values for name, values in rows.arrays().items() if name in _STEPS}
    if encoding == "root8":
        others = {name: _to_steps(values, *_STEPS[name]) for name, values in others.items()}
    elif rows.tail_logprobs is not None:
        others["tail_logprobs"] = _as_f16(rows.tail_logprobs)
    return arrays | others | ({} if rows.tail_ids is None else {"tail_ids": rows.tail_ids})


@np.errstate(all="ignore")  # as above
def decode_rows(
    arrays: dict[str, Array], encoding: str, temperatures: tuple[float, ...], tail_temperature: float
) -> TargetRows:
    """Return rows from the arrays that `encode_rows` made."""
    ids, logprobs = _decoded_entries(arrays, encoding)
    others: dict[str, Any] = {
        name: _from_steps(arrays[name], steps) if encoding == "root8" else arrays[name].astype(np.float32, copy=False)
        for name, (steps, _) in _STEPS.items()
        if name in arrays
    }
    return TargetRows(
        ids=ids,
        logprobs=logprobs,
        temperatures=temperatures,
        tail_temperature=tail_temperature,
        tail_ids=arrays.get("tail_ids"),
        log_partition=arrays.get("log_partition"),
        **others,
    )


def _decoded_entries(arrays: dict[str, Array], encoding: str) -> tuple[Array, npt.NDArray[np.float32]]:
    """Return the kept ids and their log-probs, [target, k] each; a cache of k = 0 stores neither."""
    if "topk_ids" not in arrays:
        none = (len(arrays["label_logprob"]), 0)
        return np.empty(none, np.uint32), np.empty(none, np.float32)
    ids, kept = arrays["topk_ids"], arrays["topk_logprobs"]
    if encoding == "bf16_logit":
        ids, kept = _by_rank(ids, kept ^ np.where(kept >= 0x8000, *_FLIPS))
        bits = (kept ^ np.where(kept < 0x8000, *_FLIPS)).astype(np.uint32) << 16
        return ids, bits.view(np.float32) - arrays["log_partition"][:, None]
    ids, kept = _by_rank(ids, kept) if encoding == "root8" else (ids, kept)
    return ids, decode_logprobs(kept, encoding)


def _require_numbers(rows: TargetRows) -> None:
    """Refuse NaN and +inf, which an encoding of integers would store as a finite number."""
    for name, values in rows.arrays().items():
        if values.dtype.kind == "f" and not (values < np.inf).all():
            target = int(np.argwhere(~(values < np.inf))[0][0])
            raise TargetsError(
                f"{name} of target {target} holds NaN or +inf; expected numbers or -inf: check the teacher's logits"
            )


def _as_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # below -65504 nats a probability is 0 in any precision
        return values.astype(np.float16)


def _bf16_logits(rows: TargetRows) -> dict[str, Array]:
    """Return the bits of the logits, and the log-partition that turns them into log-probs."""
    if rows.log_partition is None:
        raise TargetsError(
            "these rows lack the teacher's log-partition, which bf16_logit needs; choose another encoding"
        )
    exact = rows.logprobs + rows.log_partition[:, None].astype(np.float64)
    bits: Array = exact.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16  # to the nearest, ties to even
    logits = (bits << 16).view(np.float32)
    error = np.subtract(logits, exact, out=np.zeros_like(exact), where=np.isfinite(exact))
    wrong = abs(error) > _BF16_ERROR / 2
    if wrong.any():
        raise TargetsError(
            f"the teacher's logit {exact[wrong][0]:.6f} is not a bfloat16 number, and bf16_logit stores only such "
            "numbers; load the teacher and its head in bfloat16, or choose another encoding"
        )
    return {"topk_logprobs": bits.astype(np.uint16), "log_partition": rows.log_partition}


def _by_rank(ids: Array, scores: Array) -> tuple[npt.NDArray[np.uint32], Array]:
    """Sort each row by falling score, of 8 or 16 bits, and rising id, of fewer than 24."""
    most = np.iinfo(scores.dtype).max
    keys = (most - scores).astype(f"u{4 * scores.itemsize}") << 24 | ids
    keys.sort(axis=1)  # pairs as single integers: several times faster than argsort
    return (keys & 0xFFFFFF).astype(np.uint32), most - (keys >> 24).astype(scores.dtype)


def _to_steps(values: Array, steps_per_nat: int, dtype: Any) -> Array:
    """Round nats to steps; the least integer is reserved for -inf."""
    limits = np.iinfo(dtype)
    steps = np.rint(values.astype(np.float64) * steps_per_nat).clip(limits.min + 1, limits.max)
    return np.where(np.isneginf(values), limits.min, steps).astype(dtype)


def _from_steps(stored: Array, steps_per_nat: int) -> npt.NDArray[np.float32]:
    nats = stored.astype(np.float32) / np.float32(steps_per_nat)
    return np.where(stored == np.iinfo(stored.dtype).min, np.float32(-np.inf), nats)


def _step_bounds(values: npt.NDArray[np.float64], steps_per_nat: int, dtype: Any) -> Bounds:
    least, half_step = (np.iinfo(dtype).min + 1) / steps_per_nat, 0.5 / steps_per_nat
    return np.where(values <= least, -np.inf, values - half_step), values + half_step
