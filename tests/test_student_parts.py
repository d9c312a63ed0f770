"""The parts of a model that can be narrowed cover all of its tensors, or the model is refused."""

import pytest
import torch
from torch import nn

from benchmarks._zoo import tiny_model
from todi_offline.errors import ModelError
from todi_offline.student.parts import Sizes, width_parts


def test_the_sizes_equal_those_of_the_config() -> None:
    sizes = width_parts(tiny_model("qwen3")).sizes
    assert sizes == Sizes(hidden=32, heads=4, kv_heads=2, mlp=64, head_dim=8)
    assert sizes.group == 2
    found = tiny_model("qwen3").config.to_dict()
    assert {name: found[name] for name in sizes.in_config()} == sizes.in_config()


def test_every_norm_of_hidden_states_is_a_part_and_those_of_heads_stay_whole() -> None:
    parts = width_parts(tiny_model("gemma3_text"))
    assert len(parts.norms) == 4 * 4 + 1
    assert parts.norms[-1] == "model.norm"
    assert all("_proj" not in name for layer in parts.layers for name in layer.whole)
    assert parts.layers[0].whole == ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", r"transformer\.h\.0 has no module of the linear layers q_proj, k_proj, v_proj, o_proj"),
        ("phi3", r"model\.layers\.0 has no module of the linear layers q_proj"),  # one matrix for all three
        ("mixtral", r"model\.layers\.0 has no module of the linear layers up_proj, down_proj"),
        ("qwen2_moe", r"model\.layers\.1 has no module of the linear layers up_proj"),  # dense layers beside experts
        ("olmo", "its norms have no weights"),
        ("olmo2", r"which part of model\.layers\.0\.self_attn\.k_norm\.weight belongs"),  # over all heads
        ("bitnet", r"which part of model\.layers\.0\.mlp\.ffn_sub_norm\.weight belongs"),
        ("falcon_h1", r"which part of model\.layers\.0\.mamba\.A_log belongs"),
        ("gemma4_text", "its layers differ in size"),
        ("qwen3_5_text", r"model\.layers\.0 has no module of the linear layers q_proj"),
    ],
)
def test_a_family_with_other_parts_is_refused_by_the_name_of_one(family: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot be cut by width: .*{reason}.*make a new student of its family"):
        width_parts(tiny_model(family))


def test_queries_that_hold_more_than_the_heads_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 64, bias=False)  # as with a gate in the same matrix
    with pytest.raises(
        ModelError, match=r"layers\.1\.self_attn has \{'q_proj': 64, .*\} rows for 4 heads that share 2"
    ):
        width_parts(model)


def test_a_tensor_beside_the_layers_is_refused() -> None:
    model = tiny_model("llama")
    model.model.register_parameter("prefix", nn.Parameter(torch.zeros(3, 32)))
    with pytest.raises(ModelError, match=r"which part of model\.prefix belongs"):
        width_parts(model)
