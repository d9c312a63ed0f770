"""Log-probs of teacher and student in, one divergence a position out.

p is the teacher, q the student, both at temperature T; r = log p - log q, in natural logs. Sums run over the
entries of a position: dense, every id of the vocabulary; sparse, the kept ids and the tail, which is
everything else as one bucket, with the teacher's exact mass and the student's.

Each term of a sum is stationary in q at q = p on its own: forward KL is the sum of p r - p + q, not of p r.
Where the entries sum to one, dense and with a bucket, the added - p + q vanishes, in value and gradient. With
the kept ids alone (`tail="none"`) the added terms make q = p the solution. ToDi, Jeffreys, JS, TVD and alpha-beta
are stationary without them.

A new divergence is one function of two tensors of log-probs [..., entry]: passed in place of a name, named
`module:function`, or named by an installed package in its entry points of the group `todi_offline.divergences`.
Parameters other than ToDi's beta are bound with functools.partial; `near_teacher` says how strong it is near q = p.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.errors import ConfigError, first_line

Logprobs = Float[Tensor, "*batch entry"]
PerPosition = Float[Tensor, "*batch"]
Divergence = Callable[[Tensor, Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True, slots=True)
class Resolved:
    """A divergence with its parameters bound, and its strength near q = p.

    Attributes:
        function: two tensors of log-probs [..., entry] in, one value a position out.
        curvature: its value near q = p over that of forward KL; the sampled tail is weighted by it.
        strength: its gradient near q = p over that of forward KL.
    """

    function: Divergence
    curvature: float = 1.0
    strength: float = 1.0


def near_teacher(curvature: float) -> Callable[[F], F]:
    """Mark a divergence with its value near q = p over forward KL's, where that is not 1."""

    def mark(function: F) -> F:
        function.curvature = curvature  # type: ignore[attr-defined]
        return function

    return mark


def todi(teacher: Logprobs, student: Logprobs, beta: float = 1.0) -> PerPosition:
    """Return sum a p r - (1 - a) q r, a = sigmoid(beta r) without gradient.

    Where the teacher gives more, a > 1/2 and the forward term leads; where the student gives more, the reverse term.
    At beta = 1 the value is that of Jeffreys' divergence, but the gradient differs.
    ToDi, Jung et al. 2025, arXiv 2505.16297.
    """
    ratio = teacher - student
    gate = (beta * ratio.detach()).sigmoid()
    antigate = (-beta * ratio.detach()).sigmoid()  # 1 - gate, without cancellation
    return ((gate * teacher.exp() - antigate * student.exp()) * ratio).sum(-1)


def forward_kl(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return KL(p || q) = sum p r - p + q."""
    p, q = teacher.exp(), student.exp()
    return (p * (teacher - student) - p + q).sum(-1)


def reverse_kl(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return KL(q || p) = sum -q r - q + p."""
    return forward_kl(student, teacher)


@near_teacher(2.0)
def jeffreys(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return KL(p || q) + KL(q || p) = sum (p - q) r."""
    return ((teacher.exp() - student.exp()) * (teacher - student)).sum(-1)


@near_teacher(0.25)
def js(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2."""
    middle = _mixture(teacher, student, 0.5)
    return (forward_kl(teacher, middle) + forward_kl(student, middle)) / 2


def tvd(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return the total variation distance, sum |p - q| / 2. It has no curvature; its tail is weighted by 1."""
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


@near_teacher(0.81)  # (1 - lam)^2
def skew_forward_kl(teacher: Logprobs, student: Logprobs, lam: float = 0.1) -> PerPosition:
    """Return KL(p || lam p + (1 - lam) q), 0 < lam < 1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    return forward_kl(teacher, _mixture(teacher, student, lam))


@near_teacher(0.81)
def skew_reverse_kl(teacher: Logprobs, student: Logprobs, lam: float = 0.1) -> PerPosition:
    """Return KL(q || (1 - lam) p + lam q), 0 < lam < 1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    return forward_kl(student, _mixture(student, teacher, lam))


def adaptive_kl(teacher: Logprobs, student: Logprobs, mu: float = 0.5) -> PerPosition:
    """Return w KL(p || q) + (1 - w) KL(q || p), w the head's share of sum |p - q|, without gradient.

    The head is the teacher's most probable entries whose cumulative mass stays within mu, the first always.
    The tail's bucket is one entry of its mass, so where the tail is heavy it may be the head.
    AKL, Wu et al. 2024, arXiv 2404.02657, as in AKL.py of github.com/wutaiqiang/LLM_KD_AKL.
    """
    p, order = teacher.detach().exp().sort(dim=-1, descending=True, stable=True)
    gap = (p - student.detach().exp().gather(-1, order)).abs()
    head = p.cumsum(-1) <= mu
    head[..., 0] = True
    weight = (gap * head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return weight * forward_kl(teacher, student) + (1 - weight) * reverse_kl(teacher, student)


def alpha_beta(teacher: Logprobs, student: Logprobs, alpha: float = 0.2, beta: float = 0.7) -> PerPosition:
    """Return sum (alpha p^s + beta q^s - s p^alpha q^beta) / (alpha beta s), s = alpha + beta; all not zero.

    ABKD, Wang et al. 2025, arXiv 2505.04560. This beta has nothing to do with ToDi's. The curvature depends on p, and
    counts as 1.
    """
    s = alpha + beta
    cross = (alpha * teacher + beta * student).exp()
    terms = alpha * (s * teacher).exp() + beta * (s * student).exp() - s * cross
    return terms.sum(-1) / (alpha * beta * s)


@near_teacher(0.81)  # (1 - lam)^2
def alpha_mixture(teacher: Logprobs, student: Logprobs, alpha: float = 0.0, lam: float = 0.1) -> PerPosition:
    """Return KL(p || m), m the alpha-mixture of p and q: m ~ (lam p^s + (1 - lam) q^s)^(1/s), s = (1 - alpha) / 2.

    With alpha = -1 it is the skew forward KL; with alpha = 1, where s is 0, m ~ p^lam q^(1 - lam). m is scaled to the
    sum of lam p + (1 - lam) q, which is 1 where the entries sum to one.
    AMiD, Shin et al. 2025, arXiv 2510.15982, whose mixture goes with any divergence; the defaults here are ours.
    """
    s = (1 - alpha) / 2
    mixture = lam * teacher + (1 - lam) * student if s == 0 else _mixture(s * teacher, s * student, lam) / s
    total = _mixture(teacher, student, lam).logsumexp(-1, keepdim=True)
    return forward_kl(teacher, mixture - mixture.logsumexp(-1, keepdim=True) + total)


def concrete_score(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return half the variance of r under q, the weights q without gradient.

    The gradient by the student's logits z is q_i (d_i - sum q_j d_j), d = z less the teacher's logits, which is that of
    the concrete score loss with both weights the student's: it matches differences of logits. With the kept ids alone
    it is 0 wherever p and q are proportional.
    CSD, Kim et al. 2025, arXiv 2509.25837, as `csd` in losses.py of github.com/aailab-kaist/CSD.
    """
    weight = student.detach().softmax(-1)
    ratio = teacher - student
    mean = (weight * ratio).sum(-1, keepdim=True)
    total = student.detach().exp().sum(-1)
    return total * (weight * (ratio - mean).square()).sum(-1) / 2


def entropy_gate(teacher: Logprobs, student: Logprobs, threshold: float = 1.0) -> PerPosition:
    """Return KL(p || q) where the teacher's entropy is above the threshold, in nats, and KL(q || p) elsewhere.

    The entropy is that of the entries: the tail's bucket counts as one entry, so the entropy is a lower bound of the
    dense one.
    After Jin et al. 2026, arXiv 2603.07079, which by its abstract adds the forward KL to the reverse one where the
    teacher is unsure; here it takes its place. The threshold is ours.
    """
    entropy = -(teacher.exp() * teacher).sum(-1)
    return torch.where(entropy > threshold, forward_kl(teacher, student), reverse_kl(teacher, student))


DIVERGENCES: dict[str, Divergence] = {
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

ENTRY_POINTS = "todi_offline.divergences"
"""The group of entry points in which packages name divergences of their own."""


def resolve(divergence: str | Divergence, beta: float) -> Resolved:
    """Return a divergence with what it is near q = p; beta is ToDi's.

    ToDi's curvature is 1 + beta, its strength only 1 + beta / 2, for its gate takes no gradient. But the tail of a real
    student is not near: with a vocabulary of 4,096, beta = 1 and T = 1 the weight that fits best was measured at 2.2 to
    2.3, by least squares. The others are as strong as their curvature.

    Raises:
        ConfigError: no divergence has that name, or beta is out of range.
    """
    if not -1 <= beta < math.inf:  # below, the curvature is negative
        raise ConfigError(f"beta is {beta}; expected -1 or more")
    function = divergence
    if isinstance(function, str):
        function = DIVERGENCES.get(function) or installed_divergence(function)
    if function is todi:
        return Resolved(functools.partial(todi, beta=beta), 1 + beta, 1 + beta / 2)
    curvature = getattr(function, "curvature", 1.0)
    return Resolved(function, curvature, curvature)


def require_two_arguments(function: Divergence) -> None:
    """Refuse a function that cannot be called with the log-probs of teacher and student.

    Raises:
        ConfigError: with the reason.
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        name = getattr(function, "__name__", repr(function))
        raise ConfigError(
            f"the divergence {name} cannot be called with two tensors, the log-probs of teacher and student ({error})"
        ) from error
    except ValueError:  # a function of C that tells no signature
        return


def values_of(function: Divergence, teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return a divergence's values.

    Raises:
        ConfigError: the function does not return one value for each position.
    """
    values = function(teacher, student)
    if not isinstance(values, Tensor) or values.shape != teacher.shape[:-1]:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        name = getattr(function, "__name__", repr(function))
        raise ConfigError(
            f"the divergence {name} returns {found} for log-probs of shape {list(teacher.shape)}; expected a tensor of "
            f"shape {list(teacher.shape[:-1])}, one value a position: sum over the last axis"
        )
    return values


@functools.cache
def installed_divergence(name: str) -> Divergence:
    """Return the divergence `module:function`, or the one that an installed package has under that name.

    Raises:
        ConfigError: no divergence has that name, or its function cannot be loaded.
    """
    installed = entry_points(group=ENTRY_POINTS)
    if name in installed.names:
        point = installed[name]
    elif all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")) and ":" in name:
        point = EntryPoint(name, name, ENTRY_POINTS)
    else:
        raise ConfigError(f"divergence is {name!r}; expected {choices(name, [*DIVERGENCES, *sorted(installed.names)])}")
    try:
        function: Divergence = point.load()
    except (ImportError, AttributeError) as error:
        source = "" if point.value == name else f" from {point.value}"
        raise ConfigError(f"divergence {name!r} cannot be loaded{source}: {first_line(error)}") from error
    if not callable(function):
        raise ConfigError(f"divergence {name!r} is {function!r}; expected a function of two tensors")
    return function


def choices(given: str, known: Iterable[str]) -> str:
    """Return the names that an error lists in place of an unknown one, with the closest as a suggestion."""
    close = difflib.get_close_matches(given, known, n=1)
    return f"one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return log(weight exp(first) + (1 - weight) exp(second))."""
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))
