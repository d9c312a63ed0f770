"""A teacher that computes with only some of its channels, heads and neurons."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks._zoo import logits_of_parts, tiny_model
from todi_offline.student.masked import Kept, only_kept
from todi_offline.student.parts import width_parts

TOKENS = torch.arange(3, 43).view(2, 20)
SOME = Kept(
    hidden=torch.tensor([0, 1, 5, 6, 7, 8, 11, 12, 17, 18, 19, 20, 25, 26, 30, 31]),
    heads=torch.tensor([[0, 1], [2, 3], [0, 1], [0, 1]]),
    kv_heads=torch.tensor([[0], [1], [0], [0]]),
    neurons=torch.arange(64).view(4, 16),
)
ALL = Kept(
    hidden=torch.arange(32),
    heads=torch.arange(4).expand(4, 4),
    kv_heads=torch.arange(2).expand(4, 2),
    neurons=torch.arange(64).expand(4, 64),
)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere", "nemotron", "seed_oss"])
def test_dropped_parts_have_no_effect(family: str) -> None:
    """Two ways to leave it out: it is 0 where it is made, or where it is multiplied."""
    model = tiny_model(family)
    parts = width_parts(model)
    before = logits(model)
    with only_kept(model, parts, SOME):
        found = logits(model)
    torch.testing.assert_close(found, logits_of_parts(model, parts, SOME, TOKENS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=0.1)


def test_a_model_that_keeps_everything_is_itself() -> None:
    model = tiny_model("gemma2")
    expected = logits(model)
    with only_kept(model, width_parts(model), ALL):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = tiny_model("llama")
    before = logits(model)
    own = model.model.norm.forward
    model.model.norm.forward = lambda hidden: own(hidden)  # as accelerate patches modules
    patched = model.model.norm.forward
    with pytest.raises(RuntimeError, match="stop"), only_kept(model, width_parts(model), SOME):
        raise RuntimeError("stop")
    assert model.model.norm.forward is patched
    assert "forward" not in vars(model.model.layers[0].input_layernorm)
    assert torch.equal(logits(model), before)
