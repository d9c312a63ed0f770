"""Decoded rows in, the faults that no teacher's targets can have out.

A stored log-prob stands for every number between two bounds, which its encoding gives. A row has a fault if no choice
of numbers within the bounds is possible for a teacher.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.encoding import Bounds, bounds, logprob_bounds
from todi_offline.cache.format.rows import TargetRows

SLACK = 1e-4
"""Rounding error of a float32 softmax over 10^5 ids, in nats or in mass."""

Rows = npt.NDArray[np.bool_]
"""[target]: True where the row has a fault."""
Numbers = npt.NDArray[np.float64]


@np.errstate(all="ignore")  # the rows may hold any numbers
def faults(rows: TargetRows, labels: npt.NDArray[np.uint32], encoding: str, vocab_size: int) -> dict[str, Rows]:
    """Return every fault that rows can have, and for each fault the rows [target] that have it.

    `labels` [target] are the tokens that follow.
    """
    within = bounds(rows, encoding)
    return {
        **_id_faults(rows, vocab_size),
        **_order_faults(rows),
        **_mass_faults(rows, within, encoding),
        **_label_faults(rows, labels, within),
        **_tail_faults(rows, vocab_size, within),
    }


@np.errstate(all="ignore")
def mass_bounds(rows: TargetRows, encoding: str) -> tuple[Numbers, Numbers]:
    """Return the least and the most that the kept entries of each row can hold together."""
    lower, upper = (np.exp(bound).sum(axis=1) for bound in logprob_bounds(rows.logprobs, encoding))
    return lower, upper


def _id_faults(rows: TargetRows, vocab_size: int) -> dict[str, Rows]:
    ordered: Any = np.sort(rows.ids, axis=1)
    return {
        "ids repeat": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
        f"ids are beyond the vocabulary of {vocab_size}": (ordered >= vocab_size).any(axis=1),
    }


def _order_faults(rows: TargetRows) -> dict[str, Rows]:
    logprobs: Any = rows.logprobs
    return {
        "log-probs are NaN or above 0": ~(logprobs <= 0).all(axis=1),
        "log-probs do not fall": (logprobs[:, 1:] > logprobs[:, :-1]).any(axis=1),
    }


def _mass_faults(rows: TargetRows, within: dict[str, Bounds], encoding: str) -> dict[str, Rows]:
    tail = rows.tail_logsumexp
    least, most = (np.exp(bound).sum(axis=1) for bound in within["logprobs"])
    found = {
        "the tail's mass is NaN or infinite": ~(tail < np.inf).all(axis=1),
        "the kept mass is above 1": least > 1 + SLACK,
    }
    if 1.0 in rows.temperatures:
        column = rows.temperatures.index(1.0)
        beyond_least, beyond_most = (np.exp(bound[:, column]) for bound in within["tail_logsumexp"])
        beyond_least = beyond_least - _narrowing_error(beyond_least, encoding)
        beyond_most = beyond_most + _narrowing_error(beyond_most, encoding)
        differ = (least + beyond_least > 1 + SLACK) | (most + beyond_most < 1 - SLACK)
        found["the kept mass and the tail's mass do not add up to 1"] = differ
    return found


def _narrowing_error(mass: Numbers, encoding: str) -> Numbers:
    """Return the error of a tail's mass after rounded entries have moved into the tail.

    In `root8` the error of n entries of mass m together is at most n^(1/4) m^(3/4) / 64. As many as 64 entries may all
    be rounded to the same side; the errors of more cancel out. Each narrowing also rounds the tail to 1/64 of itself.
    """
    if encoding == "root8":
        error: Numbers = (64**0.25 * mass**0.75 + 2 * mass) / 64
    else:
        error = mass * {"q8": np.expm1(1 / 32), "f16": 2.0**-7, "bf16_logit": 1e-4}[encoding]
    return error


def _label_faults(rows: TargetRows, labels: npt.NDArray[np.uint32], within: dict[str, Bounds]) -> dict[str, Rows]:
    kept = rows.ids == labels[:, None]
    lower, upper = within["logprobs"]
    least, most = (bound[:, None] for bound in within["label_logprob"])
    differs = kept & ((most < lower - SLACK) | (least > upper + SLACK))
    above_kept = least > _most_of_last(upper) + SLACK
    return {
        "the label's log-prob is NaN or above 0": ~(rows.label_logprob <= SLACK),
        "the label's log-prob differs from that of the same kept id": differs.any(axis=1),
        "the label is not kept, but is more probable than a kept id": above_kept[:, 0] & ~kept.any(axis=1),
    }


def _tail_faults(rows: TargetRows, vocab_size: int, within: dict[str, Bounds]) -> dict[str, Rows]:
    if rows.tail_ids is None or rows.tail_logprobs is None:
        return {}
    drawn = ~np.isneginf(rows.tail_logprobs)  # samples of a tail without mass mean nothing
    samples: Any = rows.tail_ids.T  # one sample at a time: all at once would take [target, sample, k]
    among_kept: Any = np.stack([(ids[:, None] == rows.ids).any(axis=1) for ids in samples], axis=1)
    least, last_kept = within["tail_logprobs"][0], _most_of_last(within["logprobs"][1])
    return {
        "a tail sample is a kept id": (among_kept & drawn).any(axis=1),
        f"tail samples are beyond the vocabulary of {vocab_size}": (rows.tail_ids >= vocab_size).any(axis=1),
        "a tail sample's log-prob is NaN or above 0": ~(rows.tail_logprobs <= 0).all(axis=1),
        "a tail sample is more probable than a kept id": (least > last_kept + SLACK).any(axis=1),
    }


def _most_of_last(upper: Numbers) -> Numbers:
    """Return the most that the last kept entry of each row can be, [target, 1]; infinite where none is kept."""
    return upper[:, -1:] if upper.shape[1] else np.full((len(upper), 1), np.inf)
