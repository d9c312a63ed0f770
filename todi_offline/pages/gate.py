"""Log-probs of the teacher's and the student's entries in; ToDi's gate and each entry's part of the divergence out.

In float64, and equal to `todi_offline.losses.divergences.todi` and `forward_kl`, as a test checks. With beta >= 0 no
part is negative: where p > q, a p > (1 - a) q, and where p < q, a p < (1 - a) q. So the parts of a position can be
shown as shares of its sum.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import TargetsError

Values = npt.NDArray[np.float64]

FLOOR = -1e3
"""The log-prob that replaces -inf; `losses.entries` has the same, below the largest of the row."""


def teacher_entries(rows: TargetRows, temperature: float) -> tuple[Values, Values, Values]:
    """Return the teacher's log-probs at a captured temperature: kept [target, k], tail [target], label [target].

    Raises:
        TargetsError: the temperature was not captured.
    """
    if temperature not in rows.temperatures:
        captured = ", ".join(f"{number:g}" for number in rows.temperatures)
        raise TargetsError(f"temperature {temperature:g} was not captured; this cache has {captured}")
    tail = rows.tail_logsumexp[:, rows.temperatures.index(temperature)].astype(np.float64)
    kept = rows.logprobs.astype(np.float64) / temperature
    log_partition = np.logaddexp(np.logaddexp.reduce(kept, axis=1), tail)
    label = rows.label_logprob.astype(np.float64) / temperature - log_partition
    found = kept - log_partition[:, None], tail - log_partition, label
    return tuple(np.maximum(values, FLOOR) for values in found)  # type: ignore[return-value]


def entropy_bound(kept: Values, tail: Values) -> Values:
    """Return a lower bound of the entropy of each target: no id of the tail is likelier than the last kept id."""
    likeliest = np.minimum(kept[:, -1:].min(axis=1, initial=0), tail)
    bound: Values = -(np.exp(kept) * kept).sum(1) - np.exp(tail) * likeliest
    return bound


def gate(teacher: Values, student: Values, beta: float) -> Values:
    """Return a = sigmoid(beta (log p - log q)): above one half where the teacher gives an id more than the student."""
    opened: Values = 0.5 * (1 + np.tanh(0.5 * beta * (teacher - student)))
    return opened


@dataclass(frozen=True, slots=True)
class Parts:
    """What each entry of a target adds to its divergences, in nats; the tail is the last entry."""

    todi: Values
    """[target, entry]"""
    forward_kl: Values
    """[target]"""
    reverse_kl: Values
    """[target]"""
    mean_gate: Values
    """[target]: the mean of a, weighted by p. (Weighted by (p + q) / 2, it would be 1/2 wherever beta = 1.)"""


def divide(teacher: Values, student: Values, beta: float) -> Parts:
    """Return the parts of log-probs [target, entry] of both models."""
    p, q, ratio = np.exp(teacher), np.exp(student), teacher - student
    opened, closed = gate(teacher, student, beta), gate(student, teacher, beta)
    return Parts(
        todi=(opened * p - closed * q) * ratio,
        forward_kl=(p * ratio).sum(1),
        reverse_kl=-(q * ratio).sum(1),
        mean_gate=(p * opened).sum(1) / p.sum(1),
    )
