"""A model, the numbers of some of its layers and a model made of them in; nothing out, or why they are not the same."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from todi_offline.errors import ModelError
from todi_offline.models.loading import Model
from todi_offline.student.comparing import logits_difference, probe_logits, settings_difference


def decoder_layers(model: Model) -> str:
    """Return the name of the list of a model's decoder layers.

    Raises:
        ModelError: they cannot be told from other parts.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    within = {id(module) for module in model.get_decoder().modules()}
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and id(module) in within
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(outermost)} lists of {num_layers} modules, expected one, its decoder "
            "layers; this architecture cannot be cut by depth"
        )
    return str(outermost[0])


@contextlib.contextmanager
def only_layers(stack: nn.ModuleList, layers: Sequence[int]) -> Iterator[None]:
    """Within, a forward pass of a model runs these of its decoder layers, in this order, and no others.

    Each gets what the model passes to it at its own place, such as its mask and positions, but for the hidden states.
    So nothing here depends on what a config says of the layers.
    """
    originals, patched = [layer.forward for layer in stack], [vars(layer).get("forward") for layer in stack]
    calls: dict[int, tuple[Any, Any]] = {}

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[index] = args, kwargs
            output = originals[index](*args, **kwargs)  # for all that a layer returns beside its hidden states
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == len(stack) - 1:
                for layer in layers:
                    hidden = _hidden(_call(originals[layer], calls[layer], hidden))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return forward

    try:
        for index, layer in enumerate(stack):
            layer.forward = stand_in(index)
        yield
    finally:
        for layer, forward in zip(stack, patched, strict=True):
            del layer.forward
            vars(layer).update({} if forward is None else {"forward": forward})


def require_composed(model: Model, student: Model, name: str, layers: Sequence[int]) -> None:
    """Refuse a student that is something else than these layers of a model, run one after another.

    `name` is that of the decoder layers in both.

    Raises:
        ModelError: its modules are of other kinds, or it returns something else.
    """
    stack = model.get_submodule(name)
    difference = settings_difference(stack, student.get_submodule(name), layers)
    if difference is None:
        with only_layers(stack, layers):
            expected = probe_logits(model)
        difference = logits_difference(probe_logits(student), expected)
    if difference is not None:
        raise ModelError(
            f"a {type(model).__name__} of the layers {list(layers)} does not compute what these layers compute one "
            f"after another: {difference}. Its config cannot describe them; choose other layers with --keep, or random "
            "weights with --fresh"
        )


def _call(layer: Callable[..., Any], call: tuple[Any, Any], hidden: Tensor) -> Any:
    args, kwargs = call
    return layer(hidden, *args[1:], **kwargs) if args else layer(**kwargs | {"hidden_states": hidden})


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
