"""Hidden states, a head, labels and teacher targets in, `distillation_loss` and its gradients out, chunk by chunk.

The logits of all targets never exist at once. Those of a chunk are made, turned in place into their own gradient
and multiplied into the gradients of the hidden states and the head, in the forward pass.

With s = logits / T, g the derivatives of a divergence by the log-probs of its entries (kept ids, tail and samples)
and G their sum, KD's gradient by the s is

    kept j:     g_j - q_j G
    any other:  (g_tail - q_tail G) exp(s_j) / sum of exp(s) over the tail,  + g of each sample of j

because an entry's log-prob is s_j, or logsumexp of s over the tail, minus the log-partition, whose own derivative is
q. So it is the softmax inside the tail times one scalar a row, but for K + S corrections. The g are those of the
readable `entry_divergence` by autograd: [chunk, K + 1 + S] is small, and no divergence is written twice.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.entries import FLOOR, Entries, entry_divergence, teacher_entries
from todi_offline.losses.objective import sums_to_log
from todi_offline.targets import SparseTargets

CPU_CHUNK_BYTES = 64 * 2**20
"""Logits of a chunk on a CPU, and all else of their size. Of 24 to 64 MiB tried with a head of [49152, 576] the largest
was the fastest: fewer rows make the matrix products slower, which costs more than logits in the cache save."""

DEVICE_CHUNK_BYTES = 512 * 2**20
"""Elsewhere. A chunk reads the head twice and its gradient once, so there should be about as many rows as a device
does operations a byte it reads: several hundred. A reckoning, not a measurement."""


def fused_linear_distill(
    hidden: Float[Tensor, "target d"],
    weight: Float[Tensor, "vocab d"],
    labels: Int[Tensor, " target"],
    targets: SparseTargets,
    config: DistillationConfig | None = None,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    num_targets: Tensor | int | None = None,
    vocab_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_targets: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return what `distillation_loss` does for the logits of a linear head, without holding them.

    The logits are hidden @ weight.T + bias, times `scale`, and softcap * tanh(. / softcap) of that; the ids beyond
    `vocab_size` do not exist, and get no gradient. `chunk_targets` rows are in memory at a time, by default as many
    as suit the device; the numbers do not depend on it but for rounding.
    Products are in the dtype of weight, or autocast's; all else is in float32, or float64 if that is the dtype.
    The gradients of those of hidden, weight and bias that require one are computed here, and wait for backward, which
    multiplies them by the gradient of the loss; there is no second derivative.

    Raises:
        TargetsError: as `sparse_divergence`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    num_targets = max(len(labels), 1) if num_targets is None else num_targets
    later = num_targets if dtype == torch.float16 else 1  # which has no numbers as small as the gradients of a mean
    terms = _Terms(config or DistillationConfig(), num_targets / later, scale, softcap)
    gradients = _Gradients(*(_zeros_where_needed(tensor) for tensor in (hidden, weight, bias)))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head = _Head(weight[:vocab_size].to(dtype), None if bias is None else bias[:vocab_size].to(dtype))
        loss, sums = _accumulate(hidden.to(dtype), head, labels, targets, terms, chunk_targets, gradients)
    if torch.is_grad_enabled():
        loss = _WithGradients.apply(loss, gradients, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return loss / later, sums


@dataclass(frozen=True, slots=True)
class _Head:
    weight: Float[Tensor, "vocab d"]
    bias: Float[Tensor, " vocab"] | None


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the loss is, whatever the rows."""

    config: DistillationConfig
    num_targets: Tensor | float
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Buffers to add to, in float32 or float64; None where no gradient is needed."""

    hidden: Float[Tensor, "target d"] | None
    weight: Float[Tensor, "all_vocab d"] | None
    bias: Float[Tensor, " all_vocab"] | None

    def needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients, *inputs: Tensor | None) -> Tensor:
        """Keep the gradients, in the dtypes of the inputs."""
        pairs = zip((gradients.hidden, gradients.weight, gradients.bias), inputs, strict=True)
        ctx.save_for_backward(*(None if g is None or x is None else g.to(x.dtype) for g, x in pairs))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return them times the gradient of the loss; as they are where that is 1, which saves a copy of the head."""
        gradients = ctx.saved_tensors
        if outer != 1:
            gradients = [None if g is None else g * outer.to(g.dtype) for g in gradients]
        return None, None, *gradients


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _zeros_where_needed(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.zeros_like(tensor, dtype=_wide(tensor.dtype), requires_grad=False)


def _accumulate(
    hidden: Float[Tensor, "target d"],
    head: _Head,
    labels: Int[Tensor, " target"],
    targets: SparseTargets,
    terms: _Terms,
    chunk_targets: int | None,
    gradients: _Gradients,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return loss and sums, and add to the gradients, a chunk of rows at a time."""
    vocab, dtype = len(head.weight), _wide(hidden.dtype)
    step = chunk_targets or _chunk_targets(hidden.device, vocab, dtype, terms)
    buffer = hidden.new_empty(min(step, len(hidden)), vocab)
    loss = hidden.new_zeros((), dtype=dtype)
    sums: dict[str, Tensor] = {}
    for start in range(0, max(len(hidden), 1), step):  # once where there are no rows, which checks the settings
        rows = slice(start, start + step)
        some = hidden[rows]
        logits = _project(some, head, out=buffer[: len(some)]).to(dtype)
        total, part = _overwrite_with_gradient(logits, labels[rows], targets[rows], terms, gradients.needed())
        loss = loss + total
        sums = {name: value + sums.get(name, 0) for name, value in part.items()}
        if gradients.needed():
            _add_gradients(gradients, some, head, logits.to(head.weight.dtype), rows)
    return loss / terms.num_targets, sums


def _chunk_targets(device: torch.device, vocab: int, dtype: torch.dtype, terms: _Terms) -> int:
    num_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    num_copies = 1 + (terms.config.temperature != 1) + (terms.softcap is not None)  # see _overwrite_with_gradient
    return max(num_bytes // (vocab * dtype.itemsize * num_copies), 1)


def _project(hidden: Tensor, head: _Head, out: Tensor) -> Float[Tensor, "target vocab"]:
    if head.bias is None:
        return torch.mm(hidden, head.weight.T, out=out)
    return torch.addmm(head.bias, hidden, head.weight.T, out=out)


def _add_gradients(gradients: _Gradients, hidden: Tensor, head: _Head, logits: Tensor, rows: slice) -> None:
    """Multiply the gradient of a chunk's logits into those of what the logits are made of."""
    vocab = len(head.weight)
    if gradients.hidden is not None:
        _add_product(gradients.hidden[rows], logits, head.weight)
    if gradients.weight is not None:
        _add_product(gradients.weight[:vocab], logits.T, hidden)
    if gradients.bias is not None:
        gradients.bias[:vocab].add_(logits.sum(0, dtype=gradients.bias.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _overwrite_with_gradient(
    logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    targets: SparseTargets,
    terms: _Terms,
    backward: bool,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the loss, summed over rows, and the sums to log; the logits become the gradient of the mean.

    It is the gradient by the logits before scale and soft cap. Without `backward` the logits are just used up.
    """
    config = terms.config
    slope = _scale_and_cap(logits, terms, backward)
    label_logits = logits.gather(-1, labels[:, None]).squeeze(-1)
    warm = logits if config.temperature == 1 else logits / config.temperature
    split = _split(warm, targets)
    log_partition, mass = (split.log_partition, None) if warm is logits else _softmax(logits)
    cross_entropy = (log_partition - label_logits).sum()
    teacher = teacher_entries(targets, config.temperature)
    kd, by_entry = _divergence(teacher, split.student, config, backward)
    if backward:
        unit = logits.new_tensor(terms.scale) / terms.num_targets
        ce_unit = (1 - config.kd_weight) * unit
        kd_unit = config.kd_weight * unit / config.temperature
        _overwrite(warm, split, targets, by_entry, kd_unit, ce_unit if mass is None else None)
        if mass is not None:
            torch.addcmul(warm, logits, ce_unit / mass[:, None], out=logits)
        logits.scatter_add_(-1, labels[:, None], -ce_unit.expand(len(labels), 1))
        if slope is not None:
            logits.mul_(slope)
    total = (1 - config.kd_weight) * cross_entropy + config.kd_weight * kd
    return total, {"cross_entropy": cross_entropy, "kd": kd} | sums_to_log(teacher, split.student, config.k)


def _scale_and_cap(logits: Tensor, terms: _Terms, backward: bool) -> Tensor | None:
    """Scale and cap in place; return the derivative of the cap where there is one and it is asked for."""
    if terms.softcap is None:
        if terms.scale != 1:
            logits.mul_(terms.scale)
        return None
    logits.mul_(terms.scale / terms.softcap).tanh_()
    slope = 1 - logits.square() if backward else None
    logits.mul_(terms.softcap)
    return slope


def _softmax(logits: Float[Tensor, "target vocab"]) -> tuple[Float[Tensor, " target"], Float[Tensor, " target"]]:
    """Return log sum of exp(logits); the logits become a multiple of their softmax, whose sum is returned too."""
    largest = logits.amax(-1)
    mass = _exponentiate_for(logits.device.type)(logits, largest)
    return largest + mass.log(), mass


def _exponentiate(logits: Tensor, largest: Tensor) -> Tensor:
    """Return the sums of exp(logits - largest) over rows; the logits become what is summed."""
    return logits.sub_(largest[:, None]).exp_().sum(-1)


@functools.cache
def _exponentiate_for(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `_exponentiate`; on CUDA compiled, so that each logit is read and written once and not thrice."""
    compiles = device == "cuda" and importlib.util.find_spec("triton") is not None
    return torch.compile(_exponentiate, dynamic=True) if compiles else _exponentiate


@dataclass(frozen=True, slots=True)
class _Split:
    """A softmax as entries, whose log-probs are known, and the rest of its row, which is the tail's softmax times mass.

    Attributes:
        student: the entries, as `student_entries` has them.
        log_partition: log sum of exp of the row.
        mass: the sum of the rest of the row.
        kept_exist, sampled_exist: where the logit is not -inf; elsewhere the log-prob does not depend on it.
    """

    student: Entries
    log_partition: Float[Tensor, " target"]
    mass: Float[Tensor, " target"]
    kept_exist: Bool[Tensor, "target k"]
    sampled_exist: Bool[Tensor, "target sample"] | None


def _split(scaled: Float[Tensor, "target vocab"], targets: SparseTargets) -> _Split:
    """Take the entries out of the logits, which become exp(logit - largest of the tail), 0 at the kept ids.

    By the largest of the tail and not of the row, for a tail that is far below the kept ids.
    """
    kept = scaled.gather(-1, targets.ids)
    sampled = None if targets.tail_ids is None else scaled.gather(-1, targets.tail_ids)
    largest = scaled.scatter_(-1, targets.ids, -math.inf).amax(-1, keepdim=True)
    floor = torch.maximum(kept.amax(-1, keepdim=True), largest) + FLOOR
    largest = torch.maximum(largest, floor)
    # The kept ids count as the floor in the tail, so that it has a logarithm: see `student_entries`.
    rest = _exponentiate_for(scaled.device.type)(scaled, largest.squeeze(-1))[:, None]
    mass = rest + kept.shape[1] * (floor - largest).exp()
    tail = largest + mass.log()
    kept_exist = kept != -math.inf
    kept = torch.where(kept_exist, kept, floor)
    log_partition = torch.logaddexp(kept.logsumexp(-1, keepdim=True), tail)
    sampled_exist = None
    if sampled is not None:
        sampled_exist = sampled != -math.inf
        sampled = torch.where(sampled_exist, sampled, floor) - log_partition
    student = Entries(kept - log_partition, (tail - log_partition).squeeze(-1), sampled)
    return _Split(student, log_partition.squeeze(-1), mass.squeeze(-1), kept_exist, sampled_exist)


def _divergence(
    teacher: Entries, student: Entries, config: DistillationConfig, backward: bool
) -> tuple[Float[Tensor, ""], tuple[Tensor, ...] | None]:
    """Return the sum over rows, and its derivatives by the student's log-probs; None where it has no weight."""
    backward = backward and config.kd_weight != 0
    leaves = [student.kept, student.tail] + ([] if student.sampled is None else [student.sampled])
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    with torch.set_grad_enabled(backward):
        kd = entry_divergence(teacher, Entries(*leaves), config).sum()
    if not backward:
        return kd, None
    derivatives = torch.autograd.grad(kd, leaves, allow_unused=True, materialize_grads=True)
    return kd.detach(), derivatives


def _overwrite(
    rest: Float[Tensor, "target vocab"],
    split: _Split,
    targets: SparseTargets,
    derivatives: tuple[Tensor, ...] | None,
    kd_unit: Float[Tensor, ""],
    ce_unit: Float[Tensor, ""] | None,
) -> None:
    """Turn what `_split` left into kd_unit times KD's gradient, plus ce_unit times the softmax."""
    q_kept, q_tail = split.student.kept.exp(), split.student.tail.exp()
    kept, tail = torch.zeros_like(q_kept), torch.zeros_like(q_tail)
    if derivatives is not None:
        g_kept, g_tail, *g_sampled = (kd_unit * g for g in derivatives)
        g = g_kept.sum(-1) + g_tail + sum(g.sum(-1) for g in g_sampled)
        kept += torch.where(split.kept_exist, g_kept, 0) - q_kept * g[:, None]
        tail += g_tail - q_tail * g
    if ce_unit is not None:
        kept += ce_unit * q_kept
        tail += ce_unit * q_tail
    rest.mul_((tail / split.mass)[:, None]).scatter_(-1, targets.ids, kept)
    if derivatives is not None and targets.tail_ids is not None and split.sampled_exist is not None:
        rest.scatter_add_(-1, targets.tail_ids, torch.where(split.sampled_exist, g_sampled[0], 0))
