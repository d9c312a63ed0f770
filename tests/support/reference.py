"""The formulas of this library, written plainly: slow, in float64, one position at a time."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def log_softmax(logits: Sequence[float] | Vector, temperature: float = 1.0) -> Vector:
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_k(logprobs: Vector, k: int) -> list[int]:
    return sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))[:k]


def off(kept: Sequence[int], vocab: int) -> list[int]:
    return [i for i in range(vocab) if i not in set(kept)]


def tail_logsumexp(logprobs: Vector, kept: Sequence[int], temperature: float) -> float:
    mass = math.fsum(math.exp(logprobs[j] / temperature) for j in off(kept, len(logprobs)))
    return math.log(mass) if mass else -math.inf


def conditional_tail(logprobs: Vector, kept: Sequence[int], temperature: float) -> dict[int, float]:
    """Return the probability of each tail id, given that the tail was hit."""
    tail = off(kept, len(logprobs))
    weights = [math.exp(logprobs[j] / temperature) for j in tail]
    return {j: weight / math.fsum(weights) for j, weight in zip(tail, weights, strict=True)}


def draw(logprobs: Vector, kept: Sequence[int], uniform: float, temperature: float) -> int:
    reached = 0.0
    for j, probability in conditional_tail(logprobs, kept, temperature).items():
        reached += probability
        if reached > uniform:
            return j
    raise AssertionError("a uniform number is below 1")


def with_bucket(probabilities: Vector, kept: Sequence[int]) -> Vector:
    tail = math.fsum(probabilities[j] for j in off(kept, len(probabilities)))
    return np.array([*(probabilities[i] for i in kept), tail])


def tail_forward_kl(p: Vector, q: Vector, kept: Sequence[int]) -> float:
    """p_tail KL(p(.|tail) || q(.|tail))."""
    tail = off(kept, len(p))
    p_tail, q_tail = math.fsum(p[tail]), math.fsum(q[tail])
    return math.fsum(p[j] * math.log(p[j] / p_tail * q_tail / q[j]) for j in tail)


# The divergences of positive p and q, which need not sum to one. Where the library stops a gradient, `gate_q` is the q
# there, so that finite differences can hold it fixed.


def todi(p: Vector, q: Vector, beta: float = 1.0, gate_q: Vector | None = None) -> float:
    total = 0.0
    for p_i, q_i, gate_q_i in zip(p, q, q if gate_q is None else gate_q, strict=True):
        a = 1 / (1 + math.exp(-beta * math.log(p_i / gate_q_i)))
        total += a * p_i * math.log(p_i / q_i) + (1 - a) * q_i * math.log(q_i / p_i)
    return total


def forward_kl(p: Vector, q: Vector) -> float:
    return math.fsum(p_i * math.log(p_i / q_i) - p_i + q_i for p_i, q_i in zip(p, q, strict=True))


def reverse_kl(p: Vector, q: Vector) -> float:
    return math.fsum(q_i * math.log(q_i / p_i) - q_i + p_i for p_i, q_i in zip(p, q, strict=True))


def jeffreys(p: Vector, q: Vector) -> float:
    return forward_kl(p, q) + reverse_kl(p, q)


def js(p: Vector, q: Vector) -> float:
    return 0.5 * forward_kl(p, (p + q) / 2) + 0.5 * forward_kl(q, (p + q) / 2)


def tvd(p: Vector, q: Vector) -> float:
    return 0.5 * math.fsum(abs(p_i - q_i) for p_i, q_i in zip(p, q, strict=True))


def skew_forward_kl(p: Vector, q: Vector, lam: float = 0.1) -> float:
    return forward_kl(p, lam * p + (1 - lam) * q)


def skew_reverse_kl(p: Vector, q: Vector, lam: float = 0.1) -> float:
    return forward_kl(q, (1 - lam) * p + lam * q)


def adaptive_kl(p: Vector, q: Vector, mu: float = 0.5, gate_q: Vector | None = None) -> float:
    gate_q = q if gate_q is None else gate_q
    reached, head, tail = 0.0, 0.0, 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: (-p[i], i))):
        reached += p[i]
        if rank == 0 or reached <= mu:
            head += abs(p[i] - gate_q[i])
        else:
            tail += abs(p[i] - gate_q[i])
    return (head * forward_kl(p, q) + tail * reverse_kl(p, q)) / (head + tail)


def alpha_beta(p: Vector, q: Vector, alpha: float = 0.2, beta: float = 0.7) -> float:
    total = 0.0
    for p_i, q_i in zip(p, q, strict=True):
        total += p_i**alpha * q_i**beta
        total -= alpha / (alpha + beta) * p_i ** (alpha + beta) + beta / (alpha + beta) * q_i ** (alpha + beta)
    return -total / (alpha * beta)


def alpha_mixture(p: Vector, q: Vector, alpha: float = 0.0, lam: float = 0.1) -> float:
    power = (1 - alpha) / 2
    if power:
        mixture = np.array(
            [(lam * p_i**power + (1 - lam) * q_i**power) ** (1 / power) for p_i, q_i in zip(p, q, strict=True)]
        )
    else:
        mixture = np.array([p_i**lam * q_i ** (1 - lam) for p_i, q_i in zip(p, q, strict=True)])
    return forward_kl(p, mixture * (lam * p + (1 - lam) * q).sum() / mixture.sum())


def concrete_score(p: Vector, q: Vector, gate_q: Vector | None = None) -> float:
    """Return half of the sum over all pairs of q_i q_j (r_i - r_j)^2 / 2, over the sum of q."""
    gate_q = q if gate_q is None else gate_q
    r = np.log(p / q)
    pairs = math.fsum(
        w * v * (a - b) ** 2 for w, a in zip(gate_q, r, strict=True) for v, b in zip(gate_q, r, strict=True)
    )
    return pairs / 4 / gate_q.sum()


def entropy_gate(p: Vector, q: Vector, threshold: float = 1.0) -> float:
    entropy = -math.fsum(p_i * math.log(p_i) for p_i in p)
    return forward_kl(p, q) if entropy > threshold else reverse_kl(p, q)


def decoupled_kl(p: Vector, q: Vector, kept: Sequence[int], masses: float, head: float, tail: float) -> float:
    """Return the sum of the three terms of forward KL, each with its weight."""

    def inside(ids: Sequence[int]) -> float:
        p_mass, q_mass = math.fsum(p[ids]), math.fsum(q[ids])
        return p_mass * math.fsum(p[i] / p_mass * math.log(p[i] / p_mass / (q[i] / q_mass)) for i in ids)

    others = off(kept, len(p))
    between = math.fsum(
        math.fsum(p[ids]) * math.log(math.fsum(p[ids]) / math.fsum(q[ids])) for ids in (list(kept), others)
    )
    return masses * between + head * inside(list(kept)) + tail * inside(others)


DIVERGENCES: dict[str, Callable[..., float]] = {
    "todi": todi,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "js": js,
    "tvd": tvd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "alpha_mixture": alpha_mixture,
    "concrete_score": concrete_score,
    "entropy_gate": entropy_gate,
}

STOPS_GRADIENT = ("todi", "adaptive_kl", "concrete_score")


def finite_difference(function: Callable[[Vector], float], point: Vector, step: float = 1e-5) -> Vector:
    gradient = np.zeros_like(point)
    for i in range(len(point)):
        ahead, behind = point.copy(), point.copy()
        ahead[i] += step
        behind[i] -= step
        gradient[i] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def todi_entry_gradients(p: Vector, q: Vector, beta: float, detached: bool = True) -> Vector:
    """Return u_i, the derivative of ToDi by log q_i; without `detached`, the derivative of the gate is added."""
    r = np.log(p / q)
    a = 1 / (1 + np.exp(-beta * r))
    u = -a * p + (1 - a) * q * (1 - r)
    return u if detached else u - beta * a * (1 - a) * (p + q) * r


def todi_gradient(p: Vector, q: Vector, beta: float, temperature: float, detached: bool = True) -> Vector:
    """Return the dense gradient by the student's logits: (u_j - q_j G) / T."""
    u = todi_entry_gradients(p, q, beta, detached)
    return (u - q * u.sum()) / temperature


def todi_bucket_gradient(p: Vector, q: Vector, kept: Sequence[int], beta: float, temperature: float) -> Vector:
    """Return the gradient with a bucket: u_j - q_j G at a kept j, q_j (u_tail / q_tail - G) elsewhere, over T."""
    p_entries, q_entries = with_bucket(p, kept), with_bucket(q, kept)
    u = todi_entry_gradients(p_entries, q_entries, beta)
    gradient = q * (u[-1] / q_entries[-1] - u.sum())
    for entry, j in enumerate(kept):
        gradient[j] = u[entry] - q[j] * u.sum()
    return gradient / temperature


def renormalised_forward_kl(p: Vector, q: Vector, kept: Sequence[int]) -> float:
    """Return the KL from the renormalised top k of the teacher to the student, which the library does not offer."""
    return math.fsum(p[i] / p[kept].sum() * math.log(p[i] / p[kept].sum() / q[i]) for i in kept)


def mean_cross_entropy(logits: npt.NDArray[np.float64], labels: Sequence[int]) -> float:
    return -float(np.mean([log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)]))
