"""A model in, a student out: loaded, given adapters, or cut from its teacher by depth."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from todi_offline.errors import ConfigError, ModelError
from todi_offline.models import Model, Tokenizer, evaluation_mode, load_model, load_tokenizer, same_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """LoRA adapters on the student; none where `lora_r` is 0."""

    lora_r: int = 0
    """Rank of the adapters."""
    lora_alpha: int = 16
    """Their scale is alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on their input."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the modules that get one; empty leaves the choice to peft, `all-linear` takes every linear layer."""


def add_lora(model: Model, settings: LoraSettings) -> Model:
    """Wrap a student in LoRA adapters; everything else is frozen.

    Raises:
        ModelError: peft is not installed, or finds no module to adapt.
    """
    if not settings.lora_r:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("LoRA needs peft: pip install 'todi-offline[lora]'") from error
    names = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names[0] if names == ("all-linear",) else list(names) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA finds no module to adapt: {error}; name some with --lora-target-modules") from error


def spaced_layers(num_layers: int, keep: int) -> list[int]:
    """Return `keep` of the layers 0 to num_layers - 1, evenly spaced, the first and the last among them."""
    if not 1 <= keep <= num_layers:
        raise ConfigError(f"cannot keep {keep} of {num_layers} layers; choose 1 to {num_layers}")
    return [round(layer) for layer in np.linspace(0, num_layers - 1, keep).tolist()]


def prune_depth(model: Model, layers: Sequence[int]) -> Model:
    """Return a new model made of these decoder layers of `model`, in this order, and all the rest of it.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the model's layers cannot be told from its other parts.
    """
    num_layers = model.config.num_hidden_layers
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ConfigError(f"layers {list(layers)} are asked for; the model has layers 0 to {num_layers - 1}")
    prefix = _layers_prefix(model, num_layers)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    student = type(model)(config).to(model.dtype)
    state = model.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for new, old in enumerate(layers):
        source = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{key[len(source) :]}": state[key] for key in state if key.startswith(source)}
    student.load_state_dict(kept)
    student.tie_weights()
    return student


def make_student(source: str, out: Path, *, layers: int | None = None, keep: Sequence[int] = ()) -> list[int]:
    """Cut a student from a teacher, save it with the teacher's tokenizer, and return the layers that it kept.

    Either `layers`, a number of evenly spaced ones, or `keep`, their numbers.
    """
    if bool(keep) == (layers is not None):
        raise ConfigError("name either a number of layers (--layers 8) or the layers themselves (--keep 0,4,8,29)")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder for the student")
    model = load_model(source, device="cpu")
    kept = list(keep) or spaced_layers(model.config.num_hidden_layers, layers or 0)
    save_pruned(model, load_tokenizer(source), kept, out)
    return kept


def save_pruned(model: Model, tokenizer: Tokenizer, layers: Sequence[int], out: Path) -> None:
    """Save a student made of these layers of a model, with its tokenizer."""
    prune_depth(model, layers).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _layers_prefix(model: Model, num_layers: int) -> str:
    """Return the name of the list of decoder layers, with a dot behind it."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(lists) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(lists)} lists of {num_layers} modules, expected one, its decoder layers; "
            "this architecture cannot be pruned by depth here"
        )
    return f"{lists[0]}."


def packs_apart(model: Model) -> bool:
    """Whether sequences that share a row do not see each other in this model."""
    device = model.get_input_embeddings().weight.device
    first, second = torch.tensor([[1, 2, 3, 4, 5]], device=device), torch.tensor([[5, 4, 3]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    with evaluation_mode(model):
        together = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = model(input_ids=second, use_cache=False).logits
    return same_logits(together[:, 5:], alone)
