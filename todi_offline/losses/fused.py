"""Hidden states, a head, labels and teacher targets in, `distillation_loss` and its gradients out, chunk by chunk.

The logits of all targets never exist at once. Those of a chunk are made, turned in place into their own gradient
(`fused_rows`) and multiplied into the gradients of the hidden states and the head, in the forward pass.

Where positions are selected, a pass without gradients scores all rows first. With kd_weight = 1 the pass with gradients
then takes the selected rows alone; below 1 it takes all rows, for cross-entropy has a gradient everywhere.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline import tuning
from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.fused_rows import Terms, Values, overwrite_with_gradient
from todi_offline.losses.positions import parse_selection, position_weights
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
    # The gradients of a mean are too small for float16: there the loss is a sum, divided at the end.
    divide_after = num_targets if dtype == torch.float16 else 1
    terms = Terms(config or DistillationConfig(), num_targets / divide_after, scale, softcap)
    gradients = _Gradients(*(_empty_where_needed(tensor) for tensor in (hidden, weight, bias)))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head = _Head(weight[:vocab_size].to(dtype), None if bias is None else bias[:vocab_size].to(dtype))
        batch = _Batch(hidden.to(dtype), labels, targets, None)
        loss, sums = _loss_and_gradients(batch, head, terms, chunk_targets, gradients)
    if torch.is_grad_enabled():
        loss = _WithGradients.apply(loss, gradients, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return loss / divide_after, sums


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
    batch: _Batch, head: _Head, terms: Terms, chunk_targets: int | None, gradients: _Gradients
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
    batch: _Batch, head: _Head, terms: Terms, chunk_targets: int | None, gradients: _Gradients
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


def _accumulate(batch: _Batch, head: _Head, terms: Terms, chunk_targets: int | None, gradients: _Gradients) -> Values:
    """Return the values of all rows, and fill the gradients, a chunk of rows at a time."""
    hidden = batch.hidden
    vocab, dtype = len(head.weight), _wide(hidden.dtype)
    step = chunk_targets or _chunk_targets(len(hidden), hidden.device, vocab, dtype, terms)
    buffer = hidden.new_empty(min(step, len(hidden)), vocab)
    parts: list[Values] = []
    for start in range(0, max(len(hidden), 1), step):  # once where there are no rows, which checks the settings
        rows = slice(start, start + step)
        some = batch[rows]
        logits = _project(some.hidden, head, out=buffer[: len(some.hidden)]).to(dtype)
        parts.append(
            overwrite_with_gradient(
                logits, some.labels, some.targets, terms, some.kd_weights, backward=gradients.needed()
            )
        )
        if gradients.needed():
            _add_gradients(gradients, some.hidden, head, logits.to(head.weight.dtype), rows)
    _zero_beyond(vocab, gradients)
    return _joined(parts)


def _joined(parts: list[Values]) -> Values:
    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    return Values(joined("cross_entropy"), joined("kd"), joined("entropy"), joined("reverse_kl"), sums)  # type: ignore[arg-type]


def _chunk_targets(num_targets: int, device: torch.device, vocab: int, dtype: torch.dtype, terms: Terms) -> int:
    """Return the rows of a chunk: as many as are allowed, fewer where the last chunk would otherwise be small.

    Each chunk reads the whole head and adds to all of its gradient, however few rows it has.
    """
    num_bytes = tuning.chunk_bytes(device, tuning.CPU_LOSS_BYTES)
    num_copies = 1 + (terms.softcap is not None)  # `fused_rows` keeps the slope of the cap
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
