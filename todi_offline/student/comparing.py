"""A student and what it should be in; out, how they differ, or None."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from todi_offline.models.loading import Model, evaluation_mode

PROBE_TOKENS = 32
_NOT_SETTINGS = ("layer_idx", "layer_id", "num_hidden_layers", "store_full_length_kv", "training")


def probe_logits(model: Model) -> Float[Tensor, "1 seq vocab"]:
    """Return the logits of a model for the ids from 1 on."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=device)[None]
    with evaluation_mode(model):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def difference_of(name: str, found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Return by how much values are off, if it is more than this share of the largest."""
    off = float((found - expected).abs().max() / expected.abs().max())
    return None if off <= tolerance else f"{name} are off by {off:.1%} of the largest"


def logits_difference(found: Tensor, expected: Tensor) -> str | None:
    """Return by how much logits are off, if it is more than the rounding of the same operations."""
    return difference_of("its logits", found, expected, 1e-4 if expected.dtype == torch.float32 else 2e-2)


@contextlib.contextmanager
def in_float32(model: Model) -> Iterator[dict[str, torch.dtype]]:
    """Within, a model computes in float32, so that sums in another order are nearly the same.

    Yields the dtypes that the model's tensors had, and have again afterwards.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    model.float()
    try:
        yield dtypes
    finally:
        restore_dtypes(model, dtypes)


def restore_dtypes(model: Model, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the tensors of a model these dtypes, in place."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(dtypes[name])


def settings_difference(
    teacher: nn.ModuleList,
    student: nn.ModuleList,
    layers: Sequence[int],
    resized: frozenset[tuple[int, int]] = frozenset(),
) -> str | None:
    """Return how the settings of two lists of layers differ: no pass over fewer tokens shows a window.

    `layers` are the teacher's that the student's should be. A setting may change from a size to another, `resized`.
    """
    for new, old in enumerate(layers):
        others = dict(student[new].named_modules())
        for name, module in teacher[old].named_modules():
            expected, found = _settings(module), _settings(others[name]) if name in others else {}
            for setting, value in expected.items():
                same = setting in found and (found[setting] == value or (value, found[setting]) in resized)
                if not same:
                    where = f"{setting} of layer {old}'s {name or type(module).__name__}"
                    return f"{where} would be {found.get(setting)!r} and is {value!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module was built with, but for its place among the layers."""
    kinds = (bool, int, float, str, type(None))
    return {
        name: value for name, value in vars(module).items() if isinstance(value, kinds) and name not in _NOT_SETTINGS
    }
