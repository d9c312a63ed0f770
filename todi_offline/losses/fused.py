"""Hidden states, a head, labels and teacher targets in, `distillation_loss` and its gradients out, chunk by chunk.

The logits of all targets never exist at once. Those of a chunk are made, turned in place into their own gradient
and multiplied into the gradients of the hidden states and the head, in the forward pass.

With s = logits / T, g the derivatives of a divergence by the log-probs of its entries (kept ids, tail and samples)
and G their sum, KD's gradient by the s is

    kept j:     g_j - q_j G
    any other:  (g_tail - q_tail G) exp(s_j) / sum of exp(s) over the tail,  + g of each sample of j

because an entry's log-prob is s_j, or logsumexp of s over the tail, minus the log-partition, whose own derivative is
q. So the gradient is the softmax inside the tail times one scalar a row, with K + S corrections. The g come from the
readable `entry_divergence` by autograd: [chunk, K + 1 + S] is small, and no divergence is written twice.

Where positions are selected, a pass without gradients scores all rows first. With kd_weight = 1 the pass with gradients
then takes the selected rows alone; below 1 it takes all rows, for cross-entropy has a gradient everywhere.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from todi_offline import tuning
from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.entries import FLOOR, Entries, entry_divergence, teacher_entries
from todi_offline.losses.objective import reverse_kl_with_bucket, sums_to_log
from todi_offline.losses.passes import combine_rows, exponentiate_rows, pieces
from todi_offline.losses.positions import parse_selection, position_weights, student_entropy
from todi_offline.targets.sparse import SparseTargets


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
    """Return the loss and sums of `distillation_loss` for the logits of a linear head, without holding the logits.

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
    gradients = _Gradients(*(_empty_where_needed(tensor) for tensor in (hidden, weight, bias)))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head = _Head(weight[:vocab_size].to(dtype), None if bias is None else bias[:vocab_size].to(dtype))
        batch = _Batch(hidden.to(dtype), labels, targets, None)
        loss, sums = _loss_and_gradients(batch, head, terms, chunk_targets, gradients)
    if torch.is_grad_enabled():
        loss = _WithGradients.apply(loss, gradients, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return loss / later, sums


@dataclass(frozen=True, slots=True)
class _Head:
    weight: Float[Tensor, "vocab d"]
    bias: Float[Tensor, " vocab"] | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of the loss; `kd_weights` multiplies the divergence of each row, None for 1."""

    hidden: Float[Tensor, "target d"]
    labels: Int[Tensor, " target"]
    targets: SparseTargets
    kd_weights: Float[Tensor, " target"] | None

    def __getitem__(self, index: slice | Tensor) -> "_Batch":
        """Return the rows that a slice or tensor of indices selects."""
        weights = None if self.kd_weights is None else self.kd_weights[index]
        return _Batch(self.hidden[index], self.labels[index], self.targets[index], weights)


@dataclass(frozen=True, slots=True)
class _Values:
    """What is measured of rows: values a row, and the sums over rows that `sums_to_log` returns.

    `entropy` and `reverse_kl` are None where no positions are selected.
    """

    cross_entropy: Float[Tensor, " target"]
    kd: Float[Tensor, " target"]
    entropy: Float[Tensor, " target"] | None
    reverse_kl: Float[Tensor, " target"] | None
    sums: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True, slots=True)
class _Terms:
    """The terms of the loss, the same for all rows."""

    config: DistillationConfig
    num_targets: Tensor | float
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Buffers in float32 or float64. The first chunk fills them, the others add to them; None where none is needed."""

    hidden: Float[Tensor, "target d"] | None
    weight: Float[Tensor, "all_vocab d"] | None
    bias: Float[Tensor, " all_vocab"] | None

    def needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients, *inputs: Tensor | None) -> Tensor:
        """Keep the gradients, in the dtypes of the inputs."""
        pairs = zip((gradients.hidden, gradients.weight, gradients.bias), inputs, strict=True)
        ctx.gradients = [None if g is None or x is None else g.to(x.dtype) for g, x in pairs]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times the gradient of the loss, in their own memory unless the graph is kept.

        With the graph released nothing else holds them, and the head's gradient becomes its `grad` without a copy.
        """
        gradients = ctx.gradients
        assert gradients is not None, "the gradients of this loss were handed out by an earlier backward"
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return None, None, *(None if g is None else g * outer.to(g.dtype) for g in gradients)
        ctx.gradients = None
        return None, None, *(None if g is None else g.mul_(outer.to(g.dtype)) for g in gradients)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_where_needed(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.empty_like(tensor, dtype=_wide(tensor.dtype), requires_grad=False)


def _loss_and_gradients(
    batch: _Batch, head: _Head, terms: _Terms, chunk_targets: int | None, gradients: _Gradients
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return loss and sums, and fill the gradients."""
    config = terms.config
    selection = parse_selection(config.positions)
    if selection is None:
        values = _accumulate(batch, head, terms, chunk_targets, gradients)
        kd = values.kd.sum()
    else:
        values = _accumulate(batch, head, terms, chunk_targets, _Gradients(None, None, None))
        assert values.entropy is not None
        assert values.reverse_kl is not None
        weights = position_weights(selection, values.entropy, values.reverse_kl)
        kd = (values.kd * weights).sum()
        if gradients.needed():
            weighted = dataclasses.replace(batch, kd_weights=weights)
            _accumulate_selected(weighted, head, terms, chunk_targets, gradients)
    cross_entropy = values.cross_entropy.sum()
    loss = (1 - config.kd_weight) * cross_entropy + config.kd_weight * kd
    return loss / terms.num_targets, {"cross_entropy": cross_entropy, "kd": kd} | values.sums


def _accumulate_selected(
    batch: _Batch, head: _Head, terms: _Terms, chunk_targets: int | None, gradients: _Gradients
) -> None:
    """Fill the gradients, from the rows that have one."""
    assert batch.kd_weights is not None
    if terms.config.kd_weight != 1:
        _accumulate(batch, head, terms, chunk_targets, gradients)
        return
    chosen = batch.kd_weights.nonzero().flatten()
    hidden = None if gradients.hidden is None else gradients.hidden[chosen]
    part = _Gradients(hidden, gradients.weight, gradients.bias)
    _accumulate(batch[chosen], head, terms, chunk_targets, part)
    if gradients.hidden is not None and hidden is not None:
        gradients.hidden.zero_()
        gradients.hidden[chosen] = hidden


def _accumulate(batch: _Batch, head: _Head, terms: _Terms, chunk_targets: int | None, gradients: _Gradients) -> _Values:
    """Return the values of all rows, and fill the gradients, a chunk of rows at a time."""
    hidden = batch.hidden
    vocab, dtype = len(head.weight), _wide(hidden.dtype)
    step = chunk_targets or _chunk_targets(len(hidden), hidden.device, vocab, dtype, terms)
    buffer = hidden.new_empty(min(step, len(hidden)), vocab)
    parts: list[_Values] = []
    for start in range(0, max(len(hidden), 1), step):  # once where there are no rows, which checks the settings
        rows = slice(start, start + step)
        some = batch[rows]
        logits = _project(some.hidden, head, out=buffer[: len(some.hidden)]).to(dtype)
        parts.append(_overwrite_with_gradient(logits, some, terms, gradients.needed()))
        if gradients.needed():
            _add_gradients(gradients, some.hidden, head, logits.to(head.weight.dtype), rows)
    _zero_beyond(vocab, gradients)
    return _joined(parts)


def _joined(parts: list[_Values]) -> _Values:
    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    return _Values(joined("cross_entropy"), joined("kd"), joined("entropy"), joined("reverse_kl"), sums)  # type: ignore[arg-type]


def _chunk_targets(num_targets: int, device: torch.device, vocab: int, dtype: torch.dtype, terms: _Terms) -> int:
    """Return the rows of a chunk: as many as are allowed, fewer where the last chunk would otherwise be small.

    Each chunk reads the whole head and adds to all of its gradient, however few rows it has.
    """
    num_bytes = tuning.chunk_bytes(device, tuning.CPU_LOSS_BYTES)
    num_copies = 1 + (terms.softcap is not None)  # see _scale_and_cap
    most = max(num_bytes // (vocab * dtype.itemsize * num_copies), 1)
    return math.ceil(num_targets / max(math.ceil(num_targets / most), 1)) or 1


def _project(hidden: Tensor, head: _Head, out: Tensor) -> Float[Tensor, "target vocab"]:
    step = tuning.CPU_BLOCK_IDS if hidden.device.type == "cpu" else len(head.weight)
    for start in range(0, len(head.weight), step):
        ids = slice(start, start + step)
        if head.bias is None:
            torch.mm(hidden, head.weight[ids].T, out=out[:, ids])
        else:
            torch.addmm(head.bias[ids], hidden, head.weight[ids].T, out=out[:, ids])
    return out


def _add_gradients(gradients: _Gradients, hidden: Tensor, head: _Head, logits: Tensor, rows: slice) -> None:
    """Add a chunk's share to the gradients of hidden states, weight and bias, from the gradient of its logits."""
    vocab, first = len(head.weight), rows.start == 0
    if gradients.hidden is not None:
        _add_product(gradients.hidden[rows], logits, head.weight, first=True)
    if gradients.weight is not None:
        _add_product(gradients.weight[:vocab], logits.T, hidden, first)
    if gradients.bias is not None:
        _add(gradients.bias[:vocab], logits.sum(0, dtype=gradients.bias.dtype), first)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    else:
        _add(total, left @ right, first)


def _add(total: Tensor, values: Tensor, first: bool) -> None:
    if first:
        total.copy_(values)
    else:
        total.add_(values)


def _zero_beyond(vocab: int, gradients: _Gradients) -> None:
    """Zero the gradients of the ids that do not exist: no chunk writes them."""
    for gradient in (gradients.weight, gradients.bias):
        if gradient is not None:
            gradient[vocab:] = 0


def _overwrite_with_gradient(
    logits: Float[Tensor, "target vocab"], batch: _Batch, terms: _Terms, backward: bool
) -> _Values:
    """Return the values of the rows; the logits become the gradient of the loss.

    It is the gradient by the logits before scale and soft cap. Without `backward` the logits are just used up.
    """
    config, labels, targets = terms.config, batch.labels, batch.targets
    slope = _scale_and_cap(logits, terms, backward)
    label_logits = logits.gather(-1, labels[:, None]).squeeze(-1)
    entropy = reverse_kl = None
    if config.positions != "all":
        entropy = torch.cat([student_entropy(logits[rows]) for rows in pieces(logits)])
    split = _split(logits, targets, config.temperature)
    teacher = teacher_entries(targets, config.temperature)
    if config.positions != "all":
        reverse_kl = reverse_kl_with_bucket(teacher, split.student)
    kd, by_entry = _divergence(teacher, split.student, config, backward, batch.kd_weights)
    if backward:
        unit = logits.new_full((), terms.scale) / terms.num_targets  # no copy from the host, for which a GPU waits
        ce_unit = (1 - config.kd_weight) * unit
        _overwrite(logits, split, targets, config, by_entry, config.kd_weight * unit / config.temperature, ce_unit)
        logits.scatter_add_(-1, labels[:, None], -ce_unit.expand(len(labels), 1))
        if slope is not None:
            logits.mul_(slope)
    sums = sums_to_log(teacher, split.student, config.k)
    return _Values(split.log_partition - label_logits, kd, entropy, reverse_kl, sums)


def _scale_and_cap(logits: Tensor, terms: _Terms, backward: bool) -> Tensor | None:
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
