"""A model, what is kept of its parts and a model made of that in; nothing out, or why they are not the same."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from todi_offline.models.loading import Model
from todi_offline.student.comparing import difference_of, probe_logits, settings_difference
from todi_offline.student.parts import Sizes, WidthParts, described, refusal

TOLERANCE = 5e-3
"""Of the largest value, in float32. What the layers of SmolLM2-135M add to hidden states is off by up to 5e-4, for the
hidden states are so much larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The numbers of the channels, heads and neurons that a narrower model keeps, rising in each row."""

    hidden: Int[Tensor, " hidden"]
    heads: Int[Tensor, "layer head"]
    kv_heads: Int[Tensor, "layer kv_head"]
    neurons: Int[Tensor, "layer neuron"]


@contextlib.contextmanager
def only_kept(model: Model, parts: WidthParts, kept: Kept) -> Iterator[None]:
    """Within, a model's forward pass is that of the narrower model, in the model's own modules and at their sizes.

    What is not kept is 0 wherever it is made or read, and the norms see the kept channels alone. Nothing here depends
    on what a config says, or on how weights are cut.
    """
    sizes = parts.sizes
    hidden = _mask(kept.hidden, sizes.hidden)
    with contextlib.ExitStack() as stack:
        _after(stack, model.get_submodule(parts.embedding), hidden)
        for name in parts.norms:
            _replace(stack, model.get_submodule(name), kept.hidden)
        for layer, heads, neurons in zip(parts.layers, kept.heads, kept.neurons, strict=True):
            out, down = (
                model.get_submodule(f"{layer.attention}.o_proj"),
                model.get_submodule(f"{layer.mlp}.down_proj"),
            )
            _before(stack, out, _mask(heads, sizes.heads).repeat_interleave(sizes.head_dim))
            _before(stack, down, _mask(neurons, sizes.mlp))
            _after(stack, out, hidden)
            _after(stack, down, hidden)
        yield


def require_kept(model: Model, student: Model, parts: WidthParts, sizes: Sizes, kept: Kept) -> None:
    """Refuse a student that does something else than what is kept of a model, layer by layer.

    Each of its layers reads what the model's own reads, not what the layers before it made: errors of rounding grow
    from layer to layer, in SmolLM2-135M with two thirds of its neurons to 0.7% of the largest logit.

    Raises:
        ModelError: it does; both models are in float32.
    """
    stacks = model.get_submodule(parts.stack), student.get_submodule(parts.stack)
    resized = frozenset(zip(_forms(parts.sizes), _forms(sizes), strict=True))
    difference = settings_difference(*stacks, range(len(parts.layers)), resized)
    difference = difference or _difference(model, student, parts, kept)
    if difference is not None:
        raise refusal(
            model, f"a model with {described(sizes)} does not compute what the kept parts compute: {difference}"
        )


def _difference(model: Model, student: Model, parts: WidthParts, kept: Kept) -> str | None:
    names = [*(f"{parts.stack}.{number}" for number in range(len(parts.layers))), parts.norms[-1]]
    expected: list[Tensor] = []
    found: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        expected.append(hidden[..., kept.hidden.to(hidden.device)])
        return hidden

    def replace(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return expected[len(found) - 1].to(hidden.device)

    with only_kept(model, parts, kept), _reading(model, names, note):
        logits = probe_logits(model)
    with _reading(student, names, replace):
        student_logits = probe_logits(student)
    differences = [difference_of("its embeddings", found[0], expected[0], TOLERANCE)]
    for number, name in enumerate(names[:-1]):
        made = found[number + 1] - expected[number], expected[number + 1] - expected[number]
        differences.append(difference_of(f"what {name} adds to the hidden states: its values", *made, TOLERANCE))
    differences.append(difference_of("its logits", student_logits, logits, TOLERANCE))
    return next(filter(None, differences), None)


@contextlib.contextmanager
def _reading(model: Model, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, these modules read changed hidden states."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _forms(sizes: Sizes) -> Iterator[int]:
    """Yield sizes in all forms in which modules note them."""
    yield from (sizes.hidden, sizes.heads, sizes.kv_heads, sizes.group, sizes.mlp)
    yield from (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim)


def _mask(kept: Int[Tensor, " kept"], size: int) -> Float[Tensor, " size"]:
    return torch.zeros(size).index_fill(0, kept, 1.0)


def _before(stack: contextlib.ExitStack, module: nn.Module, mask: Tensor) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask.to(args[0]), *args[1:])

    stack.callback(module.register_forward_pre_hook(hook).remove)


def _after(stack: contextlib.ExitStack, module: nn.Module, mask: Tensor) -> None:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * mask.to(output)

    stack.callback(module.register_forward_hook(hook).remove)


def _replace(stack: contextlib.ExitStack, norm: nn.Module, kept: Int[Tensor, " hidden"]) -> None:
    narrow = _narrow(norm, kept)

    def forward(hidden: Tensor) -> Tensor:
        index = kept.to(hidden.device)
        return torch.zeros_like(hidden).index_copy(-1, index, type(norm).forward(narrow, hidden[..., index]))

    before = vars(norm).get("forward")
    norm.forward = forward
    stack.callback(_restore, norm, before)


def _restore(norm: nn.Module, before: Callable[..., Any] | None) -> None:
    del norm.forward
    vars(norm).update({} if before is None else {"forward": before})


def _narrow(norm: nn.Module, kept: Int[Tensor, " hidden"]) -> nn.Module:
    """Return a norm of these channels of another."""
    narrow = copy.copy(norm)
    narrow._parameters = {
        name: None if value is None else nn.Parameter(value.detach()[kept.to(value.device)], requires_grad=False)
        for name, value in norm._parameters.items()
    }
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (len(kept),)
    return narrow
