"""The importance of channels, heads and neurons, compared with its formula over recorded activations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import llama
from torch import Tensor

from todi_offline.errors import ConfigError
from todi_offline.student.importance import activation_importance
from todi_offline.student.parts import width_parts

SEQUENCES = [torch.arange(start, start + length) for start, length in ((3, 7), (40, 20), (200, 1))]


def aggregated(by_sequence: Sequence[np.ndarray]) -> list[float]:
    """The L2 norm over sequences of means over tokens, a unit at a time."""
    num_units = by_sequence[0].shape[1]
    means = [
        [sum(abs(x) for x in tokens[:, unit]) / len(tokens) for unit in range(num_units)] for tokens in by_sequence
    ]
    return [float(np.sqrt(sum(mean[unit] ** 2 for mean in means))) for unit in range(num_units)]


def written_down(model: Any, name: str, *, read: bool) -> list[np.ndarray]:
    """What a module reads or returns in each sequence, [token, channel]."""
    found: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, output: found.append((args[0] if read else output)[0]))
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(input_ids=sequence[None])
    handle.remove()
    return [values.double().numpy() for values in found]


def test_it_is_the_formula_of_minitron() -> None:
    model = llama()
    parts = width_parts(model)
    found = activation_importance(model, parts, SEQUENCES)
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    norms += ("layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm")
    of_norms = [aggregated(written_down(model, f"model.{name}", read=False)) for name in norms]
    np.testing.assert_allclose(found.hidden, np.sum(of_norms, axis=0), rtol=1e-4)
    for number in range(2):
        neurons = written_down(model, f"model.layers.{number}.mlp.down_proj", read=True)
        np.testing.assert_allclose(found.neurons[number], aggregated(neurons), rtol=1e-4)
        outputs = written_down(model, f"model.layers.{number}.self_attn.o_proj", read=True)
        heads = [np.linalg.norm(tokens.reshape(len(tokens), 4, 8), axis=-1) for tokens in outputs]
        np.testing.assert_allclose(found.heads[number], aggregated(heads), rtol=1e-4)


def test_parts_without_effect_have_no_importance() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
        model.model.layers[0].self_attn.v_proj.weight[8:16] = 0  # the second group's, which heads 2 and 3 share
        for number in range(2):
            model.model.layers[number].input_layernorm.weight[7] = 0
            model.model.layers[number].post_attention_layernorm.weight[7] = 0
        model.model.norm.weight[7] = 0
    found = activation_importance(model, width_parts(model), SEQUENCES)
    assert (found.neurons[1] == 0).nonzero().tolist() == [[5]]
    assert (found.heads == 0).nonzero().tolist() == [[0, 2], [0, 3]]
    assert (found.hidden == 0).nonzero().tolist() == [[7]]


def test_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    activation_importance(model, width_parts(model), SEQUENCES)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_sequence_there_is_none() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="no sequence to measure importance with; name other data"):
        activation_importance(model, width_parts(model), [])
