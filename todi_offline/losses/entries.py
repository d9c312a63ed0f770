"""Student logits and the teacher's logits or sparse targets in, one divergence a position out.

Both models are reduced to the log-probs of a position's entries, on which every divergence is defined.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import TargetsError
from todi_offline.losses.config import DistillationConfig, Tail
from todi_offline.losses.divergences import Divergence, resolve, values_of
from todi_offline.targets.sparse import SparseTargets, check_narrowing

FLOOR = -1e3
"""A logit of -inf is replaced by the largest logit of its row plus this many nats. Its probability is still exactly
zero, in float64 too, but its logarithm, products with it, and their gradients are finite. A less probable tail is
raised to this floor too."""


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
        ConfigError: the divergence is unknown.
    """
    return values_of(
        resolve(divergence, beta).function,
        _above_floor(teacher_logits.detach(), temperature).log_softmax(-1),
        _above_floor(student_logits, temperature).log_softmax(-1),
    )


def sparse_divergence(
    student_logits: Float[Tensor, "target vocab"],
    targets: SparseTargets | TargetRows,
    divergence: str | Divergence = "todi",
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    k: int | None = None,
    tail: str = "auto",
    tail_weight: float | None = None,
    head_weight: float = 1.0,
    mass_weight: float = 1.0,
) -> Float[Tensor, " target"]:
    """Return the divergence of each position from sparse targets; beta is ToDi's, k keeps fewer columns.

    Targets may be the rows of a cached sequence, as they are: `cache[0].targets`.

    The tail enters in one of these ways:

    - "bucket": one more entry. For ToDi and every f-divergence this equals the dense divergence if teacher and student
      have the same distribution inside the tail. An f-divergence is never more than the dense one. With every id
      kept, every divergence is dense.
    - "sampled": the bucket, and tail_weight times an estimate of p_tail KL(p(.|tail) || q(.|tail)), the part of
      forward KL that the bucket leaves out. A sample j weighs p(j) over the probability that it was drawn with, so
      neither value nor gradient has a bias, at any temperature. The samples of a cache are stratified, so the variance
      is at most that of one weighted log-ratio, and of its gradient, over the number of samples. At q = p
      the variance of the value is zero, but not that of the gradient. Entries that a smaller k drops belong to the
      tail, and are summed exactly; with k = 0 everything is the tail. tail_weight is by default the divergence's value
      near q = p over forward KL's: 1 + beta for ToDi, and 1 for a function that is not in `DIVERGENCES`. For ToDi the
      sum has a bias: it uses forward KL's direction in the tail, because a few samples cannot estimate ToDi's own well.
    - "none": the kept ids alone, by their true probabilities.
    - "auto": "sampled" where samples are stored, else "bucket".

    mass_weight and head_weight weight the two parts of the bucket's divergence: between the mass of the kept ids and
    the tail's, and inside the kept ids.

    Raises:
        ConfigError: the divergence or the tail is unknown, or a number is out of range.
        TargetsError: k is out of range, the temperature was not captured, or "sampled" is asked of targets that hold
            no samples.
    """
    config = DistillationConfig(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        k=k,
        tail=cast("Tail", tail),
        tail_weight=tail_weight,
        head_weight=head_weight,
        mass_weight=mass_weight,
    )
    targets = as_tensors(targets, student_logits.device)
    student, _ = student_entries(student_logits, targets, temperature)
    return entry_divergence(teacher_entries(targets, temperature), student, config)


def as_tensors(targets: SparseTargets | TargetRows, device: torch.device) -> SparseTargets:
    """Return targets as tensors. Rows of a cache are moved to the device; tensors stay on theirs."""
    return SparseTargets.from_numpy(targets).to(device) if isinstance(targets, TargetRows) else targets


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

    def head_and_tail(self) -> Float[Tensor, "target 2"]:
        """Return the kept entries as one and the tail as the other."""
        return torch.stack([self.kept.logsumexp(-1), self.tail], dim=-1)

    def narrow(self, k: int) -> "Entries":
        """Return the first k entries, the others moved into the tail, without samples: they are of the old tail."""
        if k:  # with 0 everything becomes the tail
            check_narrowing(k, self.kept.shape[1])
        if k == self.kept.shape[1]:
            return Entries(self.kept, self.tail)
        return Entries(self.kept[:, :k], torch.logaddexp(self.tail, self.kept[:, k:].logsumexp(-1)))


def teacher_entries(targets: SparseTargets, temperature: float) -> Entries:
    """Return the teacher's log-probs at a captured temperature.

    Raises:
        TargetsError: the temperature was not captured.
    """
    tail = targets.tail_at(temperature)[:, None]
    # Without kept ids the tail is everything, and its mass takes the place of the largest log-prob.
    floor = (targets.logprobs[:, :1] / temperature if targets.logprobs.shape[1] else tail) + FLOOR
    log_partition = targets.log_partition(temperature)[:, None]
    kept = _replace(targets.logprobs / temperature, floor) - log_partition
    tail = _replace(tail, floor) - log_partition
    if targets.tail_logprobs is None:
        return Entries(kept, tail.squeeze(-1))
    sampled = _replace(targets.tail_logprobs / temperature, floor) - log_partition
    return Entries(kept, tail.squeeze(-1), sampled, targets.proposal_logprobs())


def student_entries(
    logits: Float[Tensor, "target vocab"], targets: SparseTargets, temperature: float
) -> tuple[Entries, Float[Tensor, " target"]]:
    """Return the student's log-probs at the ids of the targets, and log sum of exp(logits / temperature).

    The tail's mass is summed over the ids of the tail: 1 - sum over the kept ids would lose it to rounding.
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


def entry_divergence(teacher: Entries, student: Entries, config: DistillationConfig) -> Float[Tensor, " target"]:
    """Return the divergence that `sparse_divergence` documents, from the entries of both models."""
    resolved = resolve(config.divergence, config.beta)
    tail = config.tail
    if tail == "auto":
        tail = "bucket" if teacher.sampled is None else "sampled"
    k = teacher.kept.shape[1] if config.k is None else config.k
    near_teacher, near_student = teacher.narrow(k), student.narrow(k)
    if k == 0 and tail != "sampled":
        raise TargetsError(f"k = 0 uses only tail samples, and tail is {tail!r}; use tail='sampled', or k of 1 or more")
    if tail == "none":
        return values_of(resolved.function, near_teacher.kept, near_student.kept)
    bucket = _with_bucket(resolved.function, near_teacher, near_student, config)
    if tail == "bucket":
        return bucket
    weight = resolved.curvature if config.tail_weight is None else config.tail_weight
    return bucket + weight * _tail_forward_kl(teacher, student, k)


def _with_bucket(
    function: Divergence, teacher: Entries, student: Entries, config: DistillationConfig
) -> Float[Tensor, " target"]:
    """Return the divergence of the kept entries and the tail, its two parts weighted.

    One part is the divergence of two entries, head and tail; the other is what is left, the part inside the head. For
    KL(p || q) the latter is the head's mass under p times the KL of both models' distributions inside the head.
    With the sampled tail these are the three terms of Dasgupta et al. 2026, arXiv 2602.20816.
    """
    whole = values_of(function, teacher.with_bucket(), student.with_bucket())
    if config.head_weight == config.mass_weight == 1 or teacher.kept.shape[1] == 0:
        return whole
    masses = values_of(function, teacher.head_and_tail(), student.head_and_tail())
    return config.mass_weight * masses + config.head_weight * (whole - masses)


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
