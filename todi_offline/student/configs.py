"""A model's config, and the layers or the sizes of a smaller model in; the config of the smaller model out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
"""Layers of one kind are those whose number, divided by the period, leaves the offset (Jamba)."""

NOT_BY_LAYER = ("architectures", "time_step_limit", "mlp_multipliers", "ssm_multipliers")
"""Lists of something else, which a model of as many layers may have. So is every list of token ids."""


def config_of_layers(config: Any, layers: Sequence[int]) -> Any:
    """Return the config of a model of these layers of a model of `config`, in this order.

    The result is what transformers would load had it been saved: all that a config derives from its values is derived
    anew. Whether it describes the layers only a comparison of the models tells.

    Raises:
        ValueError: transformers refuses it.
    """
    text = config.get_text_config(decoder=True)
    changes = dict(_changes(text.to_dict(), text.num_hidden_layers, layers))
    return _rebuilt(config, changes | {"num_hidden_layers": len(layers)})


def config_of_sizes(config: Any, sizes: Mapping[str, int]) -> Any:
    """Return the config of a model whose sizes, such as `hidden_size`, are these instead.

    Raises:
        ValueError: transformers refuses it.
    """
    return _rebuilt(config, sizes)


def _rebuilt(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return what transformers would load had the config been saved with these values of its text part."""
    text = config.get_text_config(decoder=True)
    values = text.to_dict() | {text.attribute_map.get(name, name): value for name, value in changes.items()}
    if text is not config:  # of a model of images and texts
        (name,) = (name for name, value in vars(config).items() if value is text)
        values = config.to_dict() | {name: values}
    changed = type(config).from_dict(values)
    changed._attn_implementation = config._attn_implementation
    return changed


def _changes(values: Mapping[str, Any], num_layers: int, layers: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yield what a config has to say otherwise."""
    for name, value in values.items():
        if name in _RULES and value is not None:
            yield name, _RULES[name](value, layers)
        elif isinstance(value, list) and len(value) == num_layers and not _is_other(name):
            yield name, [value[old] for old in layers]
    yield from _periodic_changes(values, num_layers, layers)


def _periodic_changes(values: Mapping[str, Any], num_layers: int, layers: Sequence[int]) -> Iterator[tuple[str, Any]]:
    if values.get("decoder_sparse_step", 1) > 1:  # every so many layers is a mixture of experts (Qwen)
        dense = [layer for layer in range(num_layers) if (layer + 1) % values["decoder_sparse_step"]]
        yield "decoder_sparse_step", 1
        yield "mlp_only_layers", _places([*dense, *(values.get("mlp_only_layers") or [])], layers)
    for period, offset in PERIODS:
        if period in values:
            members = range(values[offset], num_layers, values[period])
            yield from zip((period, offset), _period(_places(members, layers), len(layers)), strict=True)


def _is_other(name: str) -> bool:
    return name in NOT_BY_LAYER or "token_id" in name


def _period(members: Sequence[int], num_layers: int) -> tuple[int, int]:
    """Return the period and the offset of these layers; where they have none, of the first of them."""
    if not members:
        return num_layers + 1, num_layers
    period = members[1] - members[0] if len(members) > 1 else num_layers
    return max(period, members[0] + 1), members[0]


def _places(members: Sequence[int], layers: Sequence[int]) -> list[int]:
    """Return the new numbers of those of the layers that are members."""
    return [new for new, old in enumerate(layers) if old in members]


def _count(first: int, layers: Sequence[int]) -> int:
    return sum(old < first for old in layers)


def _repeated(kinds: Sequence[str], layers: Sequence[int]) -> list[str]:
    return [kinds[old % len(kinds)] for old in layers]


def _renumbered(own: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    return {str(new): own[str(old)] for new, old in enumerate(layers) if str(old) in own}


_RULES: dict[str, Callable[[Any, Sequence[int]], Any]] = {
    # numbers of layers
    **dict.fromkeys(
        ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids"), _places
    ),
    # how many layers at the beginning are of one kind
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index"), _count
    ),
    "block_types": _repeated,  # from the beginning, as often as needed (RecurrentGemma)
    "per_layer_config": _renumbered,  # what single layers have otherwise, by their number (Gemma 4)
    "num_blocks": lambda _, layers: len(layers),  # the number of layers under a second name (xLSTM)
}
"""Of values that are no lists with an entry a layer."""
