"""A fake of flash attention on a CPU: it refuses float32 and takes the bounds of sequences."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "flash_reference"
longest_seen: list[Any] = []
"""The length of the longest sequence that each call was told; None where a real kernel would read it."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    longest_seen.append(max_length_q)
    number = torch.arange(query.shape[2], device=query.device)
    sequence = torch.zeros_like(number)
    if cu_seq_lens_q is not None:
        assert cu_seq_lens_q.dtype == torch.int32
        sequence = torch.bucketize(number, cu_seq_lens_q[1:], right=True)
    elif position_ids is not None and len(query) == 1:
        sequence = (position_ids[0] == 0).cumsum(0)
    seen = (number[:, None] >= number) & (sequence[:, None] == sequence)
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def with_flash(model: Any) -> Any:
    """Return the model, with this attention."""
    model.config._attn_implementation = NAME
    return model
