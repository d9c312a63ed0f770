"""Student logits and teacher targets in, one divergence a position out; the readable form of every loss.

p is the teacher, q the student, both at temperature T; r = log p - log q, in natural logs. Sums run over the
entries of a position: dense, every id of the vocabulary; sparse, the kept ids and the tail, which is
everything else as one bucket, with the teacher's exact mass and the student's.

Each term of a sum is stationary in q at q = p on its own: forward KL is the sum of p r - p + q, not of p r.
Where the entries sum to one, dense and with a bucket, what this adds vanishes, in value and gradient. With
the kept ids alone (`tail="none"`) it is what makes q = p the solution. ToDi, Jeffreys, JS, TVD and alpha-beta
are stationary there as they stand.

A new divergence is one function of two tensors of log-probs [..., entry], put into `DIVERGENCES`. Parameters
other than ToDi's beta are bound with functools.partial, and the result is passed in place of a name.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.errors import TargetsError
from todi_offline.targets import SparseTargets, check_narrowing

Logprobs = Float[Tensor, "*batch entry"]
PerPosition = Float[Tensor, "*batch"]
Divergence = Callable[[Tensor, Tensor], Tensor]

FLOOR = -1e3
"""Where a logit is -inf, it is taken to lie this many nats from the largest of its row instead. Its
probability is still exactly zero, in float64 too, but the log of it, products with that, and their gradients
are finite. A tail less probable than that counts as that."""

TAILS = ("auto", "sampled", "bucket", "none")


def todi(teacher: Logprobs, student: Logprobs, beta: float = 1.0) -> PerPosition:
    """Return sum a p r - (1 - a) q r, a = sigmoid(beta r) without gradient.

    Where the teacher gives more, a > 1/2 and the forward term leads; where the student does, the reverse one.
    At beta = 1 the value is that of Jeffreys' divergence; the gradient is another.
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


def jeffreys(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return KL(p || q) + KL(q || p) = sum (p - q) r."""
    return ((teacher.exp() - student.exp()) * (teacher - student)).sum(-1)


def js(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2."""
    middle = _mixture(teacher, student, 0.5)
    return (forward_kl(teacher, middle) + forward_kl(student, middle)) / 2


def tvd(teacher: Logprobs, student: Logprobs) -> PerPosition:
    """Return the total variation distance, sum |p - q| / 2."""
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


def skew_forward_kl(teacher: Logprobs, student: Logprobs, lam: float = 0.1) -> PerPosition:
    """Return KL(p || lam p + (1 - lam) q), 0 < lam < 1 (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""
    return forward_kl(teacher, _mixture(teacher, student, lam))


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

    ABKD, Wang et al. 2025, arXiv 2505.04560. This beta has nothing to do with ToDi's.
    """
    s = alpha + beta
    cross = (alpha * teacher + beta * student).exp()
    terms = alpha * (s * teacher).exp() + beta * (s * student).exp() - s * cross
    return terms.sum(-1) / (alpha * beta * s)


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
}

_CURVATURES: dict[Divergence, float] = {jeffreys: 2.0, js: 0.25, skew_forward_kl: 0.81, skew_reverse_kl: 0.81}
"""Curvature near q = p over forward KL's, where it is not 1. ToDi's is 1 + beta / 2, a skew KL's (1 - lam)^2.
TVD has none, and that of alpha-beta depends on p: both count as 1."""


def dense_divergence(
    student_logits: Float[Tensor, "target vocab"],
    teacher_logits: Float[Tensor, "target vocab"],
    divergence: str | Divergence = "todi",
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, " target"]:
    """Return the divergence of each position over the whole vocabulary; beta is ToDi's.

    Raises:
        TargetsError: the divergence is unknown.
    """
    function, _ = _resolve(divergence, beta)
    return function(
        _above_floor(teacher_logits.detach(), temperature).log_softmax(-1),
        _above_floor(student_logits, temperature).log_softmax(-1),
    )


def sparse_divergence(
    student_logits: Float[Tensor, "target vocab"],
    targets: SparseTargets,
    divergence: str | Divergence = "todi",
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    k: int | None = None,
    tail: str = "auto",
    tail_weight: float | None = None,
) -> Float[Tensor, " target"]:
    """Return the divergence of each position from sparse targets; beta is ToDi's, k keeps fewer columns.

    What becomes of the tail:

    - "bucket": one more entry. For ToDi and every f-divergence this is the dense divergence where, inside the
      tail, the teacher is shaped like the student; an f-divergence is never more than the dense one. With
      every id kept, every divergence is dense.
    - "sampled": the bucket, and tail_weight times an estimate of p_tail KL(p(.|tail) || q(.|tail)), which is
      what the bucket leaves out of forward KL. A sample j weighs p(j) over the probability that it was drawn
      with, so neither value nor gradient has a bias, at any temperature; their variance is that of one
      weighted log-ratio, and of its gradient, over the number of samples. At q = p only the value's is zero.
      Entries that a smaller k drops belong to the tail, and are summed exactly. tail_weight is by default
      the divergence's curvature near q = p over forward KL's: 1 + beta / 2 for ToDi, and 1 for a function
      that is not in `DIVERGENCES`.
    - "none": the kept ids alone, by their true probabilities.
    - "auto": "sampled" where samples are stored, else "bucket".

    Raises:
        TargetsError: the divergence or the tail is unknown, k is out of range, the temperature was not
            captured, or "sampled" is asked of targets that hold no samples.
    """
    teacher = teacher_entries(targets, temperature)
    student, _ = student_entries(student_logits, targets, temperature)
    return entry_divergence(teacher, student, divergence, beta=beta, k=k, tail=tail, tail_weight=tail_weight)


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """One model's log-probs at one temperature, at the ids that sparse targets name; all finite.

    Attributes:
        kept: of the kept ids.
        tail: of all other ids together.
        sampled: of the sampled ids of the tail, or None.
        proposal: the teacher's only: the log-probs with which the samples were drawn.
    """

    kept: Float[Tensor, "target k"]
    tail: Float[Tensor, " target"]
    sampled: Float[Tensor, "target sample"] | None = None
    proposal: Float[Tensor, "target sample"] | None = None

    def with_bucket(self) -> Float[Tensor, "target entry"]:
        """Return the kept entries and the tail as one more."""
        return torch.cat([self.kept, self.tail[:, None]], dim=-1)

    def narrow(self, k: int) -> "Entries":
        """Return the first k entries, the others moved into the tail; the samples are not of it, and go."""
        check_narrowing(k, self.kept.shape[1])
        if k == self.kept.shape[1]:
            return Entries(self.kept, self.tail)
        return Entries(self.kept[:, :k], torch.logaddexp(self.tail, self.kept[:, k:].logsumexp(-1)))


def teacher_entries(targets: SparseTargets, temperature: float) -> Entries:
    """Return the teacher's log-probs at a captured temperature.

    Raises:
        TargetsError: the temperature was not captured.
    """
    floor = targets.logprobs[:, :1] / temperature + FLOOR
    log_partition = targets.log_partition(temperature)[:, None]
    kept = _replace(targets.logprobs / temperature, floor) - log_partition
    tail = _replace(targets.tail_at(temperature)[:, None], floor) - log_partition
    if targets.tail_logprobs is None:
        return Entries(kept, tail.squeeze(-1))
    sampled = _replace(targets.tail_logprobs / temperature, floor) - log_partition
    return Entries(kept, tail.squeeze(-1), sampled, targets.proposal_logprobs())


def student_entries(
    logits: Float[Tensor, "target vocab"], targets: SparseTargets, temperature: float
) -> tuple[Entries, Float[Tensor, " target"]]:
    """Return the student's log-probs at the ids of the targets, and log sum of exp(logits / temperature).

    The tail's mass is summed over its own ids: as 1 - sum over the others it would be lost to rounding.
    """
    scaled = _scale(logits, temperature)
    floor = _floor(scaled)
    kept = _replace(scaled.gather(-1, targets.ids), floor)
    # The floor in place of -inf: a row without any other finite logit would have NaN for its gradient.
    tail = scaled.scatter(-1, targets.ids, floor.expand_as(kept)).logsumexp(-1)
    log_partition = torch.logaddexp(kept.logsumexp(-1), tail)
    sampled = None
    if targets.tail_ids is not None:
        sampled = _replace(scaled.gather(-1, targets.tail_ids), floor) - log_partition[:, None]
    return Entries(kept - log_partition[:, None], tail - log_partition, sampled), log_partition


def entry_divergence(
    teacher: Entries,
    student: Entries,
    divergence: str | Divergence = "todi",
    *,
    beta: float = 1.0,
    k: int | None = None,
    tail: str = "auto",
    tail_weight: float | None = None,
) -> Float[Tensor, " target"]:
    """Return what `sparse_divergence` documents, from the entries of both models."""
    function, curvature = _resolve(divergence, beta)
    if tail not in TAILS:
        raise TargetsError(f"tail is {tail!r}; expected {_choices(tail, TAILS)}")
    if tail == "auto":
        tail = "bucket" if teacher.sampled is None else "sampled"
    k = teacher.kept.shape[1] if k is None else k
    near_teacher, near_student = teacher.narrow(k), student.narrow(k)
    if tail == "none":
        return function(near_teacher.kept, near_student.kept)
    bucket = function(near_teacher.with_bucket(), near_student.with_bucket())
    if tail == "bucket":
        return bucket
    weight = curvature if tail_weight is None else tail_weight
    return bucket + weight * _tail_forward_kl(teacher, student, k)


def _tail_forward_kl(teacher: Entries, student: Entries, k: int) -> Float[Tensor, " target"]:
    """Return an unbiased estimate of p_tail KL(p(.|tail) || q(.|tail)), the tail being all but the first k.

    By the chain rule of KL: exactly over the dropped entries and the stored tail, by samples inside that.
    """
    if teacher.sampled is None or teacher.proposal is None or student.sampled is None:
        raise TargetsError("these targets hold no samples of the tail; capture some, or use tail='bucket'")

    dropped_p, dropped_q = teacher.with_bucket()[:, k:], student.with_bucket()[:, k:]
    ratio = (dropped_p - teacher.narrow(k).tail[:, None]) - (dropped_q - student.narrow(k).tail[:, None])
    exact = (dropped_p.exp() * ratio).sum(-1)
    ratio = (teacher.sampled - teacher.tail[:, None]) - (student.sampled - student.tail[:, None])
    weight = (teacher.sampled - teacher.proposal).exp()
    return exact + (weight * ratio).mean(-1)


def _resolve(divergence: str | Divergence, beta: float) -> tuple[Divergence, float]:
    """Return a divergence as a function of two tensors, and its curvature near q = p over forward KL's."""
    if isinstance(divergence, str) and divergence not in DIVERGENCES:
        raise TargetsError(f"divergence is {divergence!r}; expected {_choices(divergence, DIVERGENCES)}")
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    if function is todi:
        return functools.partial(todi, beta=beta), 1 + beta / 2
    return function, _CURVATURES.get(function, 1.0)


def _choices(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return log(weight exp(first) + (1 - weight) exp(second))."""
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))


def _scale(logits: Tensor, temperature: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1 else logits / temperature


def _floor(scaled: Tensor) -> Tensor:
    return scaled.detach().amax(-1, keepdim=True) + FLOOR


def _replace(values: Tensor, floor: Tensor) -> Tensor:
    """Return the values with -inf replaced by the floor, which takes no gradient."""
    return torch.where(values == -math.inf, floor, values)


def _above_floor(logits: Tensor, temperature: float) -> Tensor:
    scaled = _scale(logits, temperature)
    return _replace(scaled, _floor(scaled))
