"""The arguments of a Trainer in, a refusal of those that would be ignored or misread out."""

import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from todi_offline.errors import ConfigError

_HONOURED = {
    "label_smoothing_factor": (0, "the labels' weight against the teacher is kd_weight"),
    "train_sampling_strategy": ("random", "the order follows from seed or data_seed, and batches are packed"),
    "group_by_length": (False, "the order follows from seed or data_seed, and batches are packed"),
    "average_tokens_across_devices": (True, "the loss is a mean over the targets of all ranks"),
    "deepspeed": (None, "use DDP, or FSDP with fsdp_version 2"),
    "resume_from_checkpoint": (None, "use --resume, or pass it to ToDiTrainer.train"),
}
"""Arguments of which one value alone is honoured, and what stands in place of the others."""

_CALLABLES = {
    "compute_loss_func": "pass a divergence of your own as distillation=DistillationConfig(divergence=...)",
    "compute_metrics": "evaluation reports means over targets and holds no logits; a callback sees them in on_evaluate",
    "preprocess_logits_for_metrics": "evaluation holds no logits",
    "model_init": "pass the model itself",
}


def refuse_ignored(values: Mapping[str, Any]) -> None:
    """Refuse arguments, and callables of the Trainer, that `ToDiTrainer` has no use for.

    Raises:
        ConfigError: naming the first, and what to do in its place.
    """
    for name, (honoured, remedy) in _HONOURED.items():
        if values.get(name, honoured) != honoured:
            raise ConfigError(f"{name} is {values[name]!r}, which ToDiTrainer does not support; leave it out: {remedy}")
    for name, remedy in _CALLABLES.items():
        if values.get(name) is not None:
            raise ConfigError(f"ToDiTrainer does not use {name}; {remedy}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise ConfigError(
            "accelerate is configured for DeepSpeed, which ToDiTrainer does not support; "
            f"{_HONOURED['deepspeed'][1]}: `accelerate config` writes such a file"
        )


def require_kinds(values: Mapping[str, Any], cls: type) -> None:
    """Refuse values of other types than the fields of a dataclass have: `bf16="maybe"` is true to Python.

    Raises:
        ConfigError: naming the first.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not _is_of_kind(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]).replace("typing.", ""))
            shown = "true or false" if hints[name] is bool else kind
            raise ConfigError(f"{name} is {value!r}; expected {shown}")


def _is_of_kind(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of_kind(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if kind is Any:
        return True
    plain = origin or kind
    accepted = {float: (int, float), str: (str, os.PathLike), list: (list, tuple)}.get(plain, plain)
    return isinstance(value, accepted) and (plain is bool or not isinstance(value, bool))
