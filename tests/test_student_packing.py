"""Whether sequences may share a row: in attention they may, in a recurrent state not, and a small leak is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import cohere, gemma2, gpt2, granite, llama, mamba
from transformers import LlamaConfig, LlamaForCausalLM

from todi_offline.student import packs_apart

Build = Callable[..., Any]


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere])
def test_attention_keeps_packed_sequences_apart(build: Build) -> None:
    model = build().train()
    assert packs_apart(model)
    assert model.training


def test_a_recurrent_state_does_not() -> None:
    assert not packs_apart(mamba())


class LeakingLlama(LlamaForCausalLM):
    """Sees its row as one sequence, whatever the positions say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.2])
def test_a_leak_is_noticed_however_small_the_logits_of_a_fresh_model(scale: float) -> None:
    torch.manual_seed(0)
    values = llama().config.to_dict() | {"initializer_range": scale}
    assert not packs_apart(LeakingLlama(LlamaConfig.from_dict(values)))
    assert packs_apart(llama(initializer_range=scale))
