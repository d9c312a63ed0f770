"""A model and the numbers of some of its layers in, a model of these layers out, compared with them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from todi_offline.errors import ConfigError, ModelError, first_line
from todi_offline.models import Model
from todi_offline.student.composed import decoder_layers, require_composed
from todi_offline.student.layer_config import config_of_layers


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
    try:
        student = type(model)(config_of_layers(model.config, layers))
    except (ValueError, LookupError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be made of the layers {list(layers)}: {first_line(error)}; choose others "
            "with --keep"
        ) from error
    state = _state_of_layers(model.state_dict(), f"{name}.", layers)
    _load(student, _with_stretches(state, student.state_dict(), num_layers, layers), layers)
    student.to(model.device)
    student.generation_config = _generation_config(model)
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


def _load(student: Model, state: Mapping[str, Tensor], layers: Sequence[int]) -> None:
    """Give a model copies of these tensors, in their own dtypes, or say which of them does not fit."""
    expected = student.state_dict()
    for key in sorted(state.keys() | expected.keys()):
        found, wanted = (tuple(tensors[key].shape) if key in tensors else "absent" for tensors in (state, expected))
        if found != wanted:
            raise ModelError(
                f"the config of {type(student).__name__} cannot describe the layers {list(layers)}: with it {key} "
                f"would be {wanted}, in the teacher it is {found}; choose others with --keep"
            )
    student.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    student.tie_weights()


def _generation_config(model: Model) -> Any:
    """Return how a model generates, what ends its texts above all; without settings that transformers does not save."""
    config = copy.deepcopy(model.generation_config)
    try:
        config.validate(strict=True)  # as saving does
    except ValueError:
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return type(config)(**tokens)
    return config
