"""The arguments of a Trainer come in; an error goes out if `ToDiTrainer` would ignore or misread one."""

import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from todi_offline.errors import ConfigError

_HONOURED = {
    "label_smoothing_factor": (0, "kd_weight balances the labels against the teacher"),
    "train_sampling_strategy": ("random", "seed or data_seed decides the order, and batches are packed"),
    "group_by_length": (False, "seed or data_seed decides the order, and batches are packed"),
    "average_tokens_across_devices": (True, "the loss is a mean over the targets of all ranks"),
    "deepspeed": (None, "use DDP, or FSDP with fsdp_version 2"),
    "resume_from_checkpoint": (None, "use --resume, or pass it to ToDiTrainer.train"),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        (False, "an evaluation would round the weights that are trained and saved; bf16 alone evaluates in bfloat16"),
    ),
}
"""Arguments that work only with one value: this value, and the alternative to all others."""

_CALLABLES = {
    "compute_loss_func": "pass a divergence of your own as distillation=DistillationConfig(divergence=...)",
    "compute_metrics": "evaluation keeps no logits; read its means over targets in a callback's on_evaluate",
    "preprocess_logits_for_metrics": "evaluation keeps no logits",
    "model_init": "pass the model itself",
}


_WHOLE_BATCHES = ("split_batches", "dispatch_batches")
"""Fields of `accelerator_config` that cut a batch by its rows; the targets of a packed batch are on an axis of their
own."""

_DISTANCES = ("cross_entropy", "kd", "forward_kl", "reverse_kl", "loss")


def is_distance(metric: str | None) -> bool:
    """Whether less of a metric is better. transformers knows that of names that end in `loss` alone."""
    return metric is not None and metric.endswith(_DISTANCES)


def refuse_ignored(values: Mapping[str, Any]) -> None:
    """Refuse arguments and callables of the Trainer that `ToDiTrainer` does not use.

    Raises:
        ConfigError: there is such an argument; the message names the first one and an alternative.
    """
    for name, (honoured, remedy) in _HONOURED.items():
        if values.get(name, honoured) != honoured:
            raise ConfigError(f"{name} is {values[name]!r}, which ToDiTrainer does not support; leave it out: {remedy}")
    for name, remedy in _CALLABLES.items():
        if values.get(name) is not None:
            raise ConfigError(f"ToDiTrainer does not use {name}; {remedy}")
    _refuse_cut_batches(values.get("accelerator_config"))
    if is_distance(metric := values.get("metric_for_best_model")) and values.get("greater_is_better"):
        raise ConfigError(
            f"greater_is_better is True, so the student with the largest {metric} would be the best one; set it to "
            "False (transformers' default is True for every metric whose name does not end in loss)"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise ConfigError(
            "accelerate is configured for DeepSpeed, which ToDiTrainer does not support; "
            f"{_HONOURED['deepspeed'][1]}; `accelerate config` changes the choice"
        )


def refuse_float16(model: nn.Module) -> None:
    """Refuse to train weights in float16, where a small step rounds to nothing and a gradient overflows, unnoticed.

    Raises:
        ConfigError: with the ways to train in half precision.
    """
    if any(each.requires_grad and each.dtype == torch.float16 for each in model.parameters()):
        raise ConfigError(
            "the student's weights are float16, which is too coarse to train; load them as float32 (--dtype float32) "
            "and set fp16=true or bf16=true, or load them as bfloat16, or train LoRA adapters (--lora-r)"
        )


def _refuse_cut_batches(config: Any) -> None:
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name in _WHOLE_BATCHES:
        if settings.get(name):
            raise ConfigError(
                f"accelerator_config sets {name}, which ToDiTrainer does not support; leave it out: every rank makes "
                "its own batches"
            )


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "dataloader_num_workers"),
        (lambda value: 0 <= value < math.inf, "0 or more"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "0 or more, and less than 1")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        (lambda value: value >= 1, "1 or more"),
    ),
    **dict.fromkeys(
        ("num_train_epochs", "save_steps", "logging_steps"), (lambda value: 0 < value < math.inf, "more than 0")
    ),
    "max_steps": (lambda value: value >= 1 or value == -1, "1 or more, or -1 to use num_train_epochs"),
}
"""Numbers that transformers or torch misread, or refuse once the student is loaded: their range, and it in words."""


def require_ranges(values: Mapping[str, Any]) -> None:
    """Refuse numbers out of range.

    Raises:
        ConfigError: there is one; the message names the first.
    """
    for name, (is_possible, expected) in _RANGES.items():
        if name in values and not is_possible(values[name]):
            raise ConfigError(f"{name} is {values[name]}; expected {expected}")


def require_kinds(values: Mapping[str, Any], cls: type) -> None:
    """Refuse values that don't have the type of their dataclass field, such as `bf16="maybe"`, which is true in Python.

    Raises:
        ConfigError: a value has another type; the message names the first one.
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
