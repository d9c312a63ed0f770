"""Logits of a chunk of rows, labels and teacher targets in, the values of the loss out; the logits become its gradient.

With s = logits / T, g the derivatives of a divergence by the log-probs of its entries (kept ids, tail and samples)
and G their sum, KD's gradient by the s is

    kept j:     g_j - q_j G
    any other:  (g_tail - q_tail G) exp(s_j) / sum of exp(s) over the tail,  + g of each sample of j

because an entry's log-prob is s_j, or logsumexp of s over the tail, minus the log-partition, whose own derivative is
q. So the gradient is the softmax inside the tail times one scalar a row, with K + S corrections. The g come from the
readable `entry_divergence` by autograd: [chunk, K + 1 + S] is small, and no divergence is written twice.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.entries import FLOOR, Entries, entry_divergence, teacher_entries
from todi_offline.losses.objective import reverse_kl_with_bucket, sums_to_log
from todi_offline.losses.passes import combine_rows, exponentiate_rows, pieces
from todi_offline.losses.positions import student_entropy
from todi_offline.targets.sparse import SparseTargets


@dataclass(frozen=True, slots=True)
class Values:
    """What is measured of rows: values a row, and the sums over rows that `sums_to_log` returns.

    `entropy` and `reverse_kl` are None where no positions are selected.
    """

    cross_entropy: Float[Tensor, " target"]
    kd: Float[Tensor, " target"]
    entropy: Float[Tensor, " target"] | None
    reverse_kl: Float[Tensor, " target"] | None
    sums: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of the loss, the same for all rows."""

    config: DistillationConfig
    num_targets: Tensor | float
    scale: float
    softcap: float | None


def overwrite_with_gradient(
    logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    targets: SparseTargets,
    terms: Terms,
    kd_weights: Float[Tensor, " target"] | None,
    *,
    backward: bool,
) -> Values:
    """Return the values of the rows; the logits become the gradient of the loss.

    The gradient is by the logits before scale and soft cap. `kd_weights` multiplies the divergence of each row in it,
    None for 1. Without `backward` the logits are just used up.
    """
    config = terms.config
    slope = _scale_and_cap(logits, terms, backward)
    label_logits = logits.gather(-1, labels[:, None]).squeeze(-1)
    entropy = reverse_kl = None
    if config.positions != "all":
        entropy = torch.cat([student_entropy(logits[rows]) for rows in pieces(logits)])
    split = _split(logits, targets, config.temperature)
    teacher = teacher_entries(targets, config.temperature)
    if config.positions != "all":
        reverse_kl = reverse_kl_with_bucket(teacher, split.student)
    kd, by_entry = _divergence(teacher, split.student, config, backward, kd_weights)
    if backward:
        unit = logits.new_full((), terms.scale) / terms.num_targets  # no copy from the host, for which a GPU waits
        ce_unit = (1 - config.kd_weight) * unit
        _overwrite(logits, split, targets, config, by_entry, config.kd_weight * unit / config.temperature, ce_unit)
        logits.scatter_add_(-1, labels[:, None], -ce_unit.expand(len(labels), 1))
        if slope is not None:
            logits.mul_(slope)
    sums = sums_to_log(teacher, split.student, config.k)
    return Values(split.log_partition - label_logits, kd, entropy, reverse_kl, sums)


def _scale_and_cap(logits: Tensor, terms: Terms, backward: bool) -> Tensor | None:
    """Scale and cap the logits in place; return the derivative of the cap, where there is one, for `backward`."""
    if terms.softcap is None:
        if terms.scale != 1:
            logits.mul_(terms.scale)
        return None
    logits.mul_(terms.scale / terms.softcap).tanh_()
    slope = 1 - logits.square() if backward else None
    logits.mul_(terms.softcap)
    return slope


@dataclass(frozen=True, slots=True)
class _Split:
    """A softmax at a temperature T as entries, whose log-probs are known, and the rest of its row.

    The rest is the exponentials that `exponentiate_rows` leaves, by the largest of the tail, and 0 at the kept ids.

    Attributes:
        student: the entries, as `student_entries` has them.
        mass: the sum of the rest of the row at T.
        kept_exist, sampled_exist: where the logit is not -inf; elsewhere the log-prob does not depend on it.
        log_partition: log sum of exp(logit), at T = 1.
        kept_probs, rest_prob: of the kept ids, and of an id that is 1 in the rest, at T = 1.
    """

    student: Entries
    mass: Float[Tensor, " target"]
    kept_exist: Bool[Tensor, "target k"]
    sampled_exist: Bool[Tensor, "target sample"] | None
    log_partition: Float[Tensor, " target"]
    kept_probs: Float[Tensor, "target k"]
    rest_prob: Float[Tensor, " target"]


def _split(logits: Float[Tensor, "target vocab"], targets: SparseTargets, temperature: float) -> _Split:
    """Take the entries out of the logits, which become the rest.

    The exponentials are taken relative to the largest of the tail, not of the row: a tail far below the kept ids has a
    logarithm too.
    """
    kept = logits.gather(-1, targets.ids)
    sampled = None if targets.tail_ids is None else logits.gather(-1, targets.tail_ids)
    largest_kept = kept.amax(-1) if kept.shape[1] else kept.new_full((len(kept),), -math.inf)
    least = largest_kept + temperature * FLOOR
    largest, rest, rest_at_1 = exponentiate_rows(logits.scatter_(-1, targets.ids, -math.inf), least, temperature)
    log_partition = torch.logaddexp(kept.logsumexp(-1), largest + rest_at_1.log())
    kept_probs, rest_prob = (kept - log_partition[:, None]).exp(), (largest - log_partition).exp()
    floor = torch.maximum(largest_kept, largest) + temperature * FLOOR
    # The kept ids count as the floor in the tail, so that it has a logarithm: see `student_entries`.
    mass = rest + kept.shape[1] * ((floor - largest) / temperature).exp()
    tail = largest / temperature + mass.log()
    kept_exist = kept != -math.inf
    kept = torch.where(kept_exist, kept, floor[:, None]) / temperature
    at_temperature = torch.logaddexp(kept.logsumexp(-1), tail)[:, None]
    sampled_exist = None
    if sampled is not None:
        sampled_exist = sampled != -math.inf
        sampled = torch.where(sampled_exist, sampled, floor[:, None]) / temperature - at_temperature
    student = Entries(kept - at_temperature, tail - at_temperature.squeeze(-1), sampled)
    return _Split(student, mass, kept_exist, sampled_exist, log_partition, kept_probs, rest_prob)


def _divergence(
    teacher: Entries, student: Entries, config: DistillationConfig, backward: bool, weights: Tensor | None
) -> tuple[Float[Tensor, " target"], tuple[Tensor, ...] | None]:
    """Return the value of each row, and the derivatives of their weighted sum by the student's log-probs.

    There are no derivatives where KD has no weight.
    """
    backward = backward and config.kd_weight != 0
    leaves = [student.kept, student.tail] + ([] if student.sampled is None else [student.sampled])
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    with torch.set_grad_enabled(backward):
        kd = entry_divergence(teacher, Entries(*leaves), config)
    if not backward:
        return kd, None
    with torch.enable_grad():
        total = kd.sum() if weights is None else (kd * weights).sum()
    derivatives = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return kd.detach(), derivatives


def _overwrite(
    rest: Float[Tensor, "target vocab"],
    split: _Split,
    targets: SparseTargets,
    config: DistillationConfig,
    derivatives: tuple[Tensor, ...] | None,
    kd_unit: Float[Tensor, ""],
    ce_unit: Float[Tensor, ""],
) -> None:
    """Turn the rest that `_split` left into kd_unit times KD's gradient, plus ce_unit times the softmax."""
    kept, tail = ce_unit * split.kept_probs, torch.zeros_like(split.mass)
    if derivatives is not None:
        g_kept, g_tail, *g_sampled = (kd_unit * g for g in derivatives)
        g = g_kept.sum(-1) + g_tail + sum(g.sum(-1) for g in g_sampled)
        kept += torch.where(split.kept_exist, g_kept, 0) - split.student.kept.exp() * g[:, None]
        tail += g_tail - split.student.tail.exp() * g
    combine_rows(rest, tail / split.mass, ce_unit * split.rest_prob, config.temperature)
    rest.scatter_(-1, targets.ids, kept)
    if derivatives is not None and targets.tail_ids is not None and split.sampled_exist is not None:
        rest.scatter_add_(-1, targets.tail_ids, torch.where(split.sampled_exist, g_sampled[0], 0))
