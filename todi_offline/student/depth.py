"""A model and the numbers of some of its layers in, a model of these layers out, compared with them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from todi_offline.errors import ConfigError
from todi_offline.models.loading import Model
from todi_offline.student.composed import decoder_layers, require_composed
from todi_offline.student.configs import config_of_layers
from todi_offline.student.loading import construction_errors, generation_config, load_tensors


def spaced_layers(num_layers: int, keep: int) -> list[int]:
    """Return `keep` of the layers 0 to num_layers - 1, evenly spaced, the first and the last among them."""
    if not 1 <= keep <= num_layers:
        raise ConfigError(f"cannot keep {keep} of {num_layers} layers; choose 1 to {num_layers}")
    return [round(layer) for layer in np.linspace(0, num_layers - 1, keep).tolist()]


def prune_depth(model: Model, layers: Sequence[int]) -> Model:
    """Return a new model made of these decoder layers of `model`, in this order, and all the rest of it.

    It is run once, and compared with the layers of `model` run one after another.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the model's layers cannot be told from its other parts, its config cannot say what they are, or the
            new model does something else than they do.
    """
    name = decoder_layers(model)
    num_layers = len(model.get_submodule(name))
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ConfigError(f"layers {list(layers)} are asked for; the model has layers 0 to {num_layers - 1}")
    remedy = "choose others with --keep"
    with construction_errors(f"{type(model).__name__} cannot be made of the layers {list(layers)}", remedy):
        student = type(model)(config_of_layers(model.config, layers))
    state = _state_of_layers(model.state_dict(), f"{name}.", layers)
    state = _with_stretches(state, student.state_dict(), num_layers, layers)
    load_tensors(student, state, f"the layers {list(layers)}", remedy)
    student.to(model.device)
    student.generation_config = generation_config(model)
    require_composed(model, student, name, layers)
    return student


def _state_of_layers(state: Mapping[str, Tensor], prefix: str, layers: Sequence[int]) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for new, old in enumerate(layers):
        source = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{key[len(source) :]}": state[key] for key in state if key.startswith(source)}
    return kept


def _with_stretches(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], num_layers: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """Cut tensors that hold a stretch for each layer along one axis (Gemma 3n's embeddings by layer)."""

    def cut(key: str, value: Tensor) -> Tensor:
        shape = like[key].shape if key in like else value.shape
        unlike = [axis for axis, (new, old) in enumerate(zip(shape, value.shape, strict=False)) if new != old]
        if len(unlike) != 1 or shape[unlike[0]] * num_layers != value.shape[unlike[0]] * len(layers):
            return value
        stretches = value.chunk(num_layers, dim=unlike[0])
        return torch.cat([stretches[layer] for layer in layers], dim=unlike[0])

    return {key: cut(key, value) for key, value in state.items()}
