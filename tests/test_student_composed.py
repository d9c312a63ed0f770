"""A teacher that runs only some of its layers."""

import pytest
import torch
from support.tiny_models import gemma2, llama
from torch import Tensor, nn

from benchmarks._zoo import logits_of_layers
from todi_offline.student.composed import only_layers

TOKENS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("layers", [[0, 2], [1], [0, 1, 2, 3]], ids=str)
def test_the_others_change_nothing(layers: list[int]) -> None:
    model = gemma2(num_hidden_layers=4, sliding_window=8)
    expected = logits_of_layers(model, layers, TOKENS)
    with only_layers(model.model.layers, layers):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_layers_may_come_in_any_order_and_more_than_once() -> None:
    model = llama(num_hidden_layers=3)
    reordered = llama(num_hidden_layers=3)
    reordered.model.layers = nn.ModuleList([model.model.layers[number] for number in (2, 0, 2)])
    expected = logits(reordered)
    with only_layers(model.model.layers, [2, 0, 2]):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = llama()
    before = logits(model)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate patches layers
    patched = model.model.layers[0].forward
    with pytest.raises(RuntimeError, match="stop"), only_layers(model.model.layers, [1]):
        raise RuntimeError("stop")
    assert model.model.layers[0].forward is patched
    assert "forward" not in vars(model.model.layers[1])
    assert torch.equal(logits(model), before)
