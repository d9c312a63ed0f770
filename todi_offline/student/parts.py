"""A model in; out, the parts by which it can be made narrower, or a refusal that names a part which is unknown here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from todi_offline.errors import ModelError
from todi_offline.models.loading import Model
from todi_offline.student.composed import decoder_layers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How wide a model is."""

    hidden: int
    """Channels of the hidden states."""
    heads: int
    """Heads of queries, a layer."""
    kv_heads: int
    """Heads of keys and values, a layer: each is shared by a group of the former."""
    mlp: int
    """Neurons of the MLP, a layer."""
    head_dim: int
    """Channels of a head."""

    @property
    def group(self) -> int:
        """Heads of queries that share a head of keys and values."""
        return self.heads // self.kv_heads

    def in_config(self) -> dict[str, int]:
        """Return the sizes under the names that configs have for them."""
        return {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParts:
    """The names of a decoder layer's parts in its model."""

    attention: str
    """The module of q_proj, k_proj, v_proj and o_proj."""
    mlp: str
    """The module of up_proj and down_proj, and of gate_proj where there is one."""
    whole: tuple[str, ...]
    """Tensors that no size changes: a vector for all heads, a single number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthParts:
    """The parts of a model and its sizes; every tensor of the model belongs to one of them."""

    sizes: Sizes
    stack: str
    """The name of the list of decoder layers."""
    embedding: str
    head: str
    norms: tuple[str, ...]
    """Modules that normalise hidden states, the last one last."""
    layers: tuple[LayerParts, ...]

    def projections(self, layer: LayerParts, model: Model) -> dict[str, list[str]]:
        """Return the names of a layer's linear modules by the axis of their other side than the hidden states."""
        gate = [f"{layer.mlp}.gate_proj"] if hasattr(model.get_submodule(layer.mlp), "gate_proj") else []
        return {
            "heads": [f"{layer.attention}.q_proj"],
            "kv_heads": [f"{layer.attention}.k_proj", f"{layer.attention}.v_proj"],
            "neurons": [*gate, f"{layer.mlp}.up_proj"],
        }


def width_parts(model: Model) -> WidthParts:
    """Return the parts of a model of Llama's kind: projections q, k, v, o, (gate,) up, down, and norms.

    Raises:
        ModelError: it has other parts, or layers of unlike sizes.
    """
    stack = decoder_layers(model)
    layers = [
        _layer_parts(model, f"{stack}.{number}", layer) for number, layer in enumerate(model.get_submodule(stack))
    ]
    sizes = {_sizes(model, layer) for layer in layers}
    if len(sizes) != 1:
        unlike = sorted(f"{described(size)} (heads of {size.head_dim})" for size in sizes)
        raise refusal(model, f"its layers differ in size: {'; '.join(unlike)}")
    (size,) = sizes
    names = {id(module): name for name, module in model.named_modules()}
    owners = [f"{stack}.{number}" for number in range(len(layers))] + [stack.rpartition(".")[0]]
    parts = WidthParts(
        sizes=size,
        stack=stack,
        embedding=names[id(model.get_input_embeddings())],
        head=names[id(model.get_output_embeddings())],
        norms=tuple(name for owner in owners for name in _norms(model, owner, size.hidden)),
        layers=tuple(layers),
    )
    if not parts.norms:
        raise refusal(model, "its norms have no weights, so it is not known what they normalise")
    if unknown := sorted(set(model.state_dict()) - set(_tensors(model, parts))):
        raise refusal(model, f"it is not known which part of {unknown[0]} belongs to which channel")
    return parts


def described(sizes: Sizes) -> str:
    """Return sizes as a message says them."""
    return f"{sizes.hidden} channels, {sizes.heads} heads, {sizes.kv_heads} heads of keys, and {sizes.mlp} neurons"


def refusal(model: Model, why: str) -> ModelError:
    """Return the error that a model cannot be made narrower."""
    return ModelError(
        f"{type(model).__name__} cannot be cut by width: {why}; cut its depth with --layers alone, or make a new "
        "student of its family with --fresh"
    )


def _layer_parts(model: Model, name: str, layer: nn.Module) -> LayerParts:
    found = []
    for kind in (ATTENTION, MLP):
        holders = [
            child
            for child, module in layer.named_children()
            if all(type(getattr(module, part, None)) is nn.Linear for part in kind)
        ]
        if len(holders) != 1:
            counted = "no module" if not holders else f"{len(holders)} modules"
            raise refusal(model, f"{name} has {counted} of the linear layers {', '.join(kind)}")
        found.append(f"{name}.{holders[0]}")
    head_dim = _head_dim(model, found[0])
    whole = [
        f"{holder}.{tensor}"
        for holder in found
        for tensor, value in model.get_submodule(holder).state_dict().items()
        if value.numel() == 1 or (holder == found[0] and tuple(value.shape) == (head_dim,) and "_proj." not in tensor)
    ]
    return LayerParts(attention=found[0], mlp=found[1], whole=tuple(whole))


def _head_dim(model: Model, attention: str) -> int:
    num_heads, num_kv_heads = _num_heads(model)
    rows = {part: model.get_submodule(f"{attention}.{part}").out_features for part in ATTENTION[:3]}
    columns = model.get_submodule(f"{attention}.o_proj").in_features
    head_dim = int(rows["q_proj"] // num_heads)
    fits = rows["q_proj"] == columns == num_heads * head_dim and rows["k_proj"] == num_kv_heads * head_dim
    if not (fits and rows["v_proj"] == rows["k_proj"] and num_heads % num_kv_heads == 0):
        raise refusal(model, f"{attention} has {rows} rows for {num_heads} heads that share {num_kv_heads}")
    return head_dim


def _num_heads(model: Model) -> tuple[int, int]:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _sizes(model: Model, layer: LayerParts) -> Sizes:
    heads, kv_heads = _num_heads(model)
    down: Any = model.get_submodule(f"{layer.mlp}.down_proj")
    return Sizes(
        hidden=down.out_features,
        heads=heads,
        kv_heads=kv_heads,
        mlp=down.in_features,
        head_dim=_head_dim(model, layer.attention),
    )


def _norms(model: Model, owner: str, hidden: int) -> Iterator[str]:
    """Yield the names of the modules of an owner that have a number for each channel of the hidden states."""
    for name, module in model.get_submodule(owner).named_children():
        shapes = {tuple(parameter.shape) for parameter in module.parameters()}
        if shapes == {(hidden,)}:
            yield f"{owner}.{name}" if owner else name


def _tensors(model: Model, parts: WidthParts) -> Iterator[str]:
    """Yield the names of the tensors that the parts have."""
    modules = [parts.embedding, parts.head, *parts.norms]
    for layer in parts.layers:
        modules += [name for names in parts.projections(layer, model).values() for name in names]
        modules += [f"{layer.attention}.o_proj", f"{layer.mlp}.down_proj"]
        yield from layer.whole
    for module in modules:
        yield from (f"{module}.{name}" for name in ("weight", "bias"))
