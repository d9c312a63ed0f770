"""A model and some sequences in; out, how much each of its channels, heads and neurons does there.

As Minitron has it (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2), forward passes alone tell:

    head i of a layer       the L2 norm of its output, before the output projection
    neuron i of a layer     |what the down projection reads of it|
    hidden channel i        |what a norm returns in it|, summed over all norms of the model

each the mean over the tokens of a sequence, and of these means the L2 norm over the sequences, the pair of
aggregations that the paper settles on.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from todi_offline.errors import ConfigError
from todi_offline.models.loading import Model, evaluation_mode
from todi_offline.student.parts import WidthParts


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Numbers of which the larger ones are kept; they compare within a row only."""

    hidden: Float[Tensor, " hidden"]
    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer neuron"]


@dataclass(slots=True)
class _Squares:
    """The sum over sequences of squared means over tokens, by the name of the module that was watched."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, magnitudes: Float[Tensor, "1 seq unit"]) -> None:
        mean = magnitudes.float().mean((0, 1))
        self.sums[name] = self.sums.get(name, torch.zeros_like(mean)) + mean.square()

    def norms(self, names: Iterable[str]) -> Float[Tensor, "module unit"]:
        return torch.stack([self.sums[name].sqrt().cpu() for name in names])


def activation_importance(model: Model, parts: WidthParts, sequences: Iterable[Int[Tensor, " seq"]]) -> Importance:
    """Run a model over some sequences, one at a time, and return the importance of its parts.

    Raises:
        ConfigError: there is no sequence.
    """
    squares = _Squares()
    device = model.get_input_embeddings().weight.device
    outs = [f"{layer.attention}.o_proj" for layer in parts.layers]
    downs = [f"{layer.mlp}.down_proj" for layer in parts.layers]
    with evaluation_mode(model), contextlib.ExitStack() as stack:
        for name in parts.norms:
            _watch(stack, model, name, lambda name, _, output: squares.add(name, output.abs()))
        for name in outs:
            _watch(stack, model, name, lambda name, x, _: squares.add(name, _head_norms(x, parts.sizes.heads)))
        for name in downs:
            _watch(stack, model, name, lambda name, x, _: squares.add(name, x.abs()))
        for sequence in sequences:
            model(input_ids=sequence[None].to(device), use_cache=False)
    if not squares.sums:
        raise ConfigError("there is no sequence to measure importance with; name other data with --importance-data")
    return Importance(hidden=squares.norms(parts.norms).sum(0), heads=squares.norms(outs), neurons=squares.norms(downs))


def _watch(stack: contextlib.ExitStack, model: Model, name: str, note: Callable[[str, Tensor, Tensor], None]) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        note(name, args[0], output)

    stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)


def _head_norms(outputs: Float[Tensor, "batch seq head_x_dim"], num_heads: int) -> Float[Tensor, "batch seq head"]:
    norms: Tensor = torch.linalg.vector_norm(outputs.float().view(*outputs.shape[:-1], num_heads, -1), dim=-1)
    return norms
