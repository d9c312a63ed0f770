"""A teacher and sizes in; a new model of the teacher's family and of these sizes out, with the teacher's embeddings."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.errors import ConfigError, ModelError
from todi_offline.models.loading import Model
from todi_offline.student.comparing import probe_logits
from todi_offline.student.configs import config_of_layers, config_of_sizes
from todi_offline.student.depth import spaced_layers
from todi_offline.student.loading import construction_errors, generation_config
from todi_offline.student.width import OPTIONS, Widths

_SIZES = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "mlp": "intermediate_size"}


def fresh_student(model: Model, widths: Widths, *, layers: int | None = None, seed: int = 42) -> Model:
    """Return a new model of a teacher's family, with random weights by the family's own initialisation.

    Without `layers` it has as many as the teacher. Where it has fewer, they are of the kinds of evenly spaced ones.
    Sizes that are not named go with the hidden size: as many heads and neurons, in proportion, and heads as wide as the
    teacher's. Embeddings are the teacher's: with the same hidden size they, and the head, are copied; with a smaller
    one the input embeddings are projected on their first principal directions (not centred), which keeps as much as can
    be of their inner products (Eckart and Young), and a head of its own stays random.

    Raises:
        ConfigError: a size is none.
        ModelError: transformers cannot make a model of these sizes, or it cannot read a sequence.
    """
    asked = f"a new {type(model).__name__} of {_described(widths, layers)}"
    remedy = "choose other sizes, or name more of them (--heads, --kv-heads, --mlp)"
    with construction_errors(f"{asked} cannot be made", remedy):
        config = _fresh_config(model, widths, layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = type(model)(config)
        student = student.to(model.device)
        for parameter in student.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(model.dtype)
        _take_embeddings(model, student)
        finite = bool(probe_logits(student).isfinite().all())
    if not finite:
        raise ModelError(f"{asked} returns logits that are not finite; {remedy}")
    student.generation_config = generation_config(model)
    return student


def _fresh_config(model: Model, widths: Widths, layers: int | None) -> Any:
    asked = {"--layers": layers} | {option: getattr(widths, name) for name, option in OPTIONS.items()}
    for option, value in asked.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; expected 1 or more")
    text = model.config.get_text_config(decoder=True)
    config = model.config
    if layers is not None:
        config = config_of_layers(config, _kinds(text.num_hidden_layers, layers))
    return config_of_sizes(config, dict(_sizes(text, widths)))


def _kinds(num_layers: int, layers: int) -> list[int]:
    """Return the teacher's layers whose kinds the new ones have; the last one's again where there are more."""
    spaced = spaced_layers(num_layers, min(layers, num_layers))
    return spaced + [num_layers - 1] * (layers - len(spaced))


def _sizes(text: Any, widths: Widths) -> Iterator[tuple[str, int]]:
    """Yield the sizes that the config has: those that are asked for, else the teacher's in proportion."""
    hidden = widths.hidden or text.hidden_size
    yield "hidden_size", hidden
    old = {name: value for name, key in _SIZES.items() if isinstance(value := getattr(text, key, None), int)}
    scaled = {name: max(1, round(value * hidden / text.hidden_size)) for name, value in old.items()}
    if "heads" in old and "kv_heads" in old:
        scaled["heads"] = scaled["kv_heads"] * (old["heads"] // old["kv_heads"])
    for name, value in scaled.items():
        asked: int | None = getattr(widths, name)
        yield _SIZES[name], value if asked is None else asked


@torch.no_grad()
def _take_embeddings(teacher: Model, student: Model) -> None:
    old, new = teacher.get_input_embeddings().weight, student.get_input_embeddings().weight
    if old.shape == new.shape:
        new.copy_(old)
        head, own = teacher.get_output_embeddings().weight, student.get_output_embeddings().weight
        if own is not new and own.shape == head.shape:
            own.copy_(head)
    elif len(old) == len(new) and new.shape[1] < old.shape[1]:
        new.copy_(principal_projection(old, new.shape[1]))


def principal_projection(rows: Float[Tensor, "row wide"], num: int) -> Float[Tensor, "row narrow"]:
    """Return rows in the `num` orthogonal directions in which they are largest."""
    wide = rows.float()
    directions: Tensor = torch.linalg.eigh(wide.T @ wide)[1][:, -num:].flip(1)  # they come by rising eigenvalue
    return (wide @ directions).to(rows.dtype)


def _described(widths: Widths, layers: int | None) -> str:
    sizes = {"layers": layers, "hidden": widths.hidden, "heads": widths.heads}
    sizes |= {"kv_heads": widths.kv_heads, "mlp": widths.mlp}
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None) or "its own sizes"
