"""A model, sizes and some sequences in; a narrower model of these sizes out, compared with the parts that it keeps."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.errors import ConfigError
from todi_offline.models.loading import Model
from todi_offline.student.comparing import in_float32, restore_dtypes
from todi_offline.student.configs import config_of_sizes
from todi_offline.student.importance import Importance, activation_importance
from todi_offline.student.loading import construction_errors, generation_config, load_tensors
from todi_offline.student.masked import Kept, require_kept
from todi_offline.student.parts import Sizes, WidthParts, described, width_parts

OPTIONS = {"hidden": "--hidden", "heads": "--heads", "kv_heads": "--kv-heads", "mlp": "--mlp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """The sizes that are asked for; None leaves a size to the others."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None

    def __bool__(self) -> bool:
        """Whether any is asked for."""
        return any(value is not None for value in asdict(self).values())


def prune_width(model: Model, widths: Widths, sequences: Iterable[Int[Tensor, " seq"]]) -> Model:
    """Return a new model of the channels, heads and neurons of `model` that do most in these sequences.

    Hidden channels are the same in every layer, heads and neurons each layer's own. Heads of queries that share keys
    stay together: where there are to be fewer heads of keys, whole groups go; where a group is to be smaller, its least
    important heads go. The size of a head stays. The new model is run once, and compared with `model` in which all the
    rest is 0.

    Raises:
        ConfigError: a size is larger than the model's, or the heads cannot be divided into groups.
        ModelError: the model has parts that cannot be cut, its config cannot say how wide it is, or the new model does
            something else than its parts.
    """
    parts = width_parts(model)
    sizes = resolve_sizes(widths, parts.sizes)
    with _sizes_errors(model, sizes):  # before the sequences are read
        config_of_sizes(model.config, sizes.in_config())
    kept = most_important(activation_importance(model, parts, sequences), parts.sizes, sizes)
    return narrow_model(model, parts, sizes, kept)


def resolve_sizes(widths: Widths, teacher: Sizes) -> Sizes:
    """Return the sizes of a model that is cut from one of the sizes `teacher`.

    Raises:
        ConfigError: as `prune_width`.
    """
    for name, option in OPTIONS.items():
        asked, most = getattr(widths, name), getattr(teacher, name)
        if asked is not None and not 1 <= asked <= most:
            raise ConfigError(f"{option} is {asked}, but the teacher has {most}; choose 1 to {most}, or --fresh")
    heads, kv_heads = widths.heads, widths.kv_heads
    if kv_heads is None:
        kv_heads = teacher.kv_heads if heads is None else heads // teacher.group
    heads = kv_heads * teacher.group if heads is None else heads
    if not kv_heads or heads % kv_heads or heads // kv_heads > teacher.group:
        raise ConfigError(
            f"{heads} heads cannot share {kv_heads} heads of keys: each head of keys needs the same number of heads, "
            f"at most {teacher.group} as in the teacher; choose other --heads and --kv-heads"
        )
    return replace(
        teacher, hidden=widths.hidden or teacher.hidden, heads=heads, kv_heads=kv_heads, mlp=widths.mlp or teacher.mlp
    )


def most_important(importance: Importance, teacher: Sizes, student: Sizes) -> Kept:
    """Return what a model of the sizes `student` keeps of one of the sizes `teacher`."""
    by_group = importance.heads.view(-1, teacher.kv_heads, teacher.group)
    in_group = by_group.topk(student.group)
    kv_heads = _largest(in_group.values.sum(-1), student.kv_heads)
    members = in_group.indices.sort().values + teacher.group * torch.arange(teacher.kv_heads)[:, None]
    heads = members.gather(1, kv_heads[..., None].expand(-1, -1, student.group)).flatten(1)
    return Kept(
        hidden=_largest(importance.hidden, student.hidden),
        heads=heads,
        kv_heads=kv_heads,
        neurons=_largest(importance.neurons, student.mlp),
    )


def narrow_model(model: Model, parts: WidthParts, sizes: Sizes, kept: Kept) -> Model:
    """Return a new model of what is kept of `model`.

    Raises:
        ModelError: as `prune_width`.
    """
    with _sizes_errors(model, sizes):
        student = type(model)(config_of_sizes(model.config, sizes.in_config()))
    remedy = f"choose --hidden as {sizes.head_dim} times --heads, or make a new student of its family with --fresh"
    with in_float32(model) as dtypes:
        state = dict(_cut_tensors(model, parts, kept))
        _keep_embedding_scale(model, student, parts, state)
        load_tensors(student, state, described(sizes), remedy)
        student.to(model.device)
        require_kept(model, student, parts, sizes, kept)
    restore_dtypes(student, dtypes)
    student.generation_config = generation_config(model)
    return student


def _sizes_errors(model: Model, sizes: Sizes) -> AbstractContextManager[None]:
    return construction_errors(f"{type(model).__name__} cannot have {described(sizes)}", "choose other sizes")


def _largest(importance: Float[Tensor, "*row unit"], num: int) -> Int[Tensor, "*row kept"]:
    return importance.topk(num).indices.sort().values


def _cut_tensors(model: Model, parts: WidthParts, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the narrower model."""
    axes = dict(_axes(model, parts, kept))
    for key, value in model.state_dict().items():
        cut = value
        for axis, index in enumerate(axes.get(key.rpartition(".")[0], ())):
            if index is not None and axis < value.dim():
                cut = cut.index_select(axis, index.to(value.device))
        yield key, cut


def _axes(model: Model, parts: WidthParts, kept: Kept) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """Yield modules and what is kept along the axes of their weights; their biases lie along the first."""
    yield parts.embedding, (None, kept.hidden)
    yield parts.head, (None, kept.hidden)
    yield from ((name, (kept.hidden,)) for name in parts.norms)
    head_dim = parts.sizes.head_dim
    for number, layer in enumerate(parts.layers):
        rows = {
            "heads": _rows(kept.heads[number], head_dim),
            "kv_heads": _rows(kept.kv_heads[number], head_dim),
            "neurons": kept.neurons[number],
        }
        for axis, names in parts.projections(layer, model).items():
            yield from ((name, (rows[axis], kept.hidden)) for name in names)
        yield f"{layer.attention}.o_proj", (kept.hidden, rows["heads"])
        yield f"{layer.mlp}.down_proj", (kept.hidden, rows["neurons"])


def _rows(heads: Int[Tensor, " head"], head_dim: int) -> Int[Tensor, " row"]:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _keep_embedding_scale(model: Model, student: Model, parts: WidthParts, state: dict[str, Tensor]) -> None:
    """Where embeddings are multiplied by the root of the hidden size (Gemma), make up for the smaller root.

    A head that is tied to them is larger by as much, so the last norm, which it reads, becomes smaller.
    """
    of_teacher, of_student = (getattr(m.get_input_embeddings(), "scalar_embed_scale", None) for m in (model, student))
    if of_teacher is None or of_teacher == of_student:
        return
    ratio = float(of_teacher / of_student)
    state[f"{parts.embedding}.weight"] = state[f"{parts.embedding}.weight"] * ratio
    if student.config.get_text_config(decoder=True).tie_word_embeddings:
        state[f"{parts.head}.weight"] = state[f"{parts.embedding}.weight"]
        last = f"{parts.norms[-1]}.weight"
        offset = _offset(model.get_submodule(parts.norms[-1]))
        state[last] = (state[last] + offset) / ratio - offset


@torch.no_grad()
def _offset(norm: Any) -> float:
    """Return what a norm adds to its weight before it multiplies by it: 1 in Gemma, else 0."""
    probe = torch.ones_like(norm.weight)
    probe[::2] = -1
    factor = norm(probe[None])[0] * probe
    return round(float((factor - norm.weight)[0]))
