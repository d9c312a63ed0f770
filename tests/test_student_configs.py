"""The config of a student: the fields of each kept layer, and the sizes."""

from typing import Any

import pytest

from benchmarks._zoo import tiny_config
from todi_offline.student.configs import config_of_layers, config_of_sizes


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("smollm3", [1, 2, 3], {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 1]}),
        ("llama4_text", [1, 2, 3], {"moe_layers": [0, 2], "no_rope_layers": [0, 1, 1]}),
        ("qwen3_moe", [0, 1, 3], {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
        ("qwen2_moe", [1, 2, 3], {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
        ("gemma2", [3, 0], {"layer_types": ["full_attention", "sliding_attention"]}),
        ("deepseek_v3", [0, 2], {"first_k_dense_replace": 1}),
        ("deepseek_v3", [1, 2], {"first_k_dense_replace": 0}),
        ("jamba", [0, 2, 3], {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
        ("jamba", [0, 2], {"layer_types": ["linear_attention", "linear_attention"]}),
        ("jamba", [1, 3], {"layer_types": ["full_attention", "full_attention"]}),
        ("gpt2", [0], {"n_layer": 1, "num_hidden_layers": 1}),
        ("gemma4_text", [2, 3], {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_config_describes_the_layers_that_are_kept(family: str, layers: list[int], expected: dict[str, Any]) -> None:
    config = config_of_layers(tiny_config(family), layers)
    assert {name: getattr(config, name) for name in expected} == expected


def test_lists_that_have_something_else_in_each_entry_are_left_whole() -> None:
    given = tiny_config("mamba2", num_hidden_layers=2, eos_token_id=[2, 5])
    config = config_of_layers(given, [1])
    assert (list(config.time_step_limit), config.eos_token_id) == (list(given.time_step_limit), [2, 5])


def test_the_text_part_of_a_config_is_changed_and_nothing_else() -> None:
    from transformers import Gemma3Config

    text = tiny_config("gemma3_text").to_dict()
    config = config_of_layers(Gemma3Config(text_config=text), [0, 3])
    assert config.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert config.text_config.num_hidden_layers == 2
    assert config.vision_config.to_dict() == Gemma3Config(text_config=text).vision_config.to_dict()


def test_the_given_config_stays_as_it_was() -> None:
    config = tiny_config("smollm3")
    before = config.to_dict()
    config_of_layers(config, [3])
    assert config.to_dict() == before


def test_sizes_stand_in_a_config_under_its_own_names() -> None:
    config = config_of_sizes(tiny_config("gpt2"), {"hidden_size": 16, "num_attention_heads": 2})
    assert (config.n_embd, config.n_head, config.n_layer) == (16, 2, 4)


def test_a_size_that_a_config_does_not_have_is_kept_with_it() -> None:
    config = config_of_sizes(tiny_config("qwen2"), {"hidden_size": 16, "head_dim": 8})
    assert type(config).from_dict(config.to_dict()).head_dim == 8
