"""A new student of a teacher's family: initial weights, sizes that agree, and the teacher's embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import llama, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks._zoo import tiny_model
from todi_offline.errors import ConfigError, ModelError
from todi_offline.student.fresh import fresh_student, principal_projection
from todi_offline.student.width import Widths

TOKENS = torch.arange(3, 43).view(2, 20)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3_text", "qwen3_moe", "gpt2", "deepseek_v3", "mamba", "jamba", "falcon_h1", "phi3", "bloom"],
)
def test_any_family_has_a_smaller_student(family: str, tmp_path: Path) -> None:
    teacher = tiny_model(family)
    student = fresh_student(teacher, Widths(hidden=16), layers=2)
    assert type(student) is type(teacher)
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 2)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


def test_sizes_that_are_not_named_go_with_the_hidden_size() -> None:
    config = fresh_student(llama(), Widths(hidden=16)).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (config.intermediate_size, config.num_hidden_layers) == (32, 2)
    config = fresh_student(llama(), Widths(hidden=16, heads=4, kv_heads=4, mlp=24), layers=3).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 8)
    assert (config.intermediate_size, config.num_hidden_layers) == (24, 3)


def test_the_kinds_of_layers_equal_those_of_spaced_layers() -> None:
    teacher = tiny_model("smollm3")  # of its layers the second has no positions
    assert fresh_student(teacher, Widths(), layers=2).config.no_rope_layers == [1, 1]
    assert fresh_student(teacher, Widths(), layers=6).config.no_rope_layers == [1, 0, 1, 1, 1, 1]


def test_weights_are_the_familys_own_initialisation_and_follow_from_the_seed() -> None:
    teacher = llama(initializer_range=0.05)
    made = [fresh_student(teacher, Widths(hidden=16), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(logits(made[0]), logits(made[1]))
    assert not torch.equal(logits(made[0]), logits(made[2]))
    weight = made[0].model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert made[0].model.norm.weight.eq(1).all()


def test_the_global_random_state_is_restored() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fresh_student(llama(), Widths(hidden=16))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_the_same_size_are_copied(tied: bool) -> None:
    teacher = llama(tie_word_embeddings=tied)
    student = fresh_student(teacher, Widths(), layers=1)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_a_smaller_size_are_projected(tied: bool) -> None:
    teacher = llama(tie_word_embeddings=tied)
    student = fresh_student(teacher, Widths(hidden=16))
    projected = principal_projection(teacher.model.embed_tokens.weight.detach(), 16)
    assert torch.equal(student.model.embed_tokens.weight, projected)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_a_projection_keeps_as_much_of_inner_products_as_can_be_kept() -> None:
    rows = torch.randn(100, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = principal_projection(rows.float(), 5).double()
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    best = left[:, :5] * sizes[:5] @ right[:5]
    torch.testing.assert_close(found @ found.T, best @ best.T, rtol=1e-4, atol=1e-4)
    norms = found.norm(dim=0)
    torch.testing.assert_close(norms, sizes[:5], rtol=1e-4, atol=1e-4)  # the largest first


def test_a_student_has_its_teachers_dtype_and_ends_texts_as_it_does(tmp_path: Path) -> None:
    teacher = llama().bfloat16()
    teacher.generation_config.update(eos_token_id=[2, 5])
    student = fresh_student(teacher, Widths(hidden=16))
    save(student, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == student.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, student.model.rotary_emb.inv_freq, rtol=0, atol=0)
    assert loaded.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        (
            "llama",
            {"hidden": 18, "heads": 4},
            r"The hidden size \(18\) is not a multiple of the number of attention heads",
        ),
        ("mamba2", {"hidden": 16}, r"hidden_size \* expand \(32\) must equal num_heads \* head_dim \(64\)"),
        ("xlstm", {"hidden": 16}, "The size of tensor a"),
    ],
)
def test_sizes_that_a_family_cannot_have_are_refused(family: str, sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^a new \w+ of hidden \d+.* cannot be made: .*{reason}.*; choose other sizes"
    ):
        fresh_student(tiny_model(family), Widths(**sizes))


@pytest.mark.parametrize("sizes", [{"hidden": 0}, {"heads": -1}, {"kv_heads": 0}, {"mlp": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"--\S+ is (0|-1); expected 1 or more"):
        fresh_student(llama(), Widths(**sizes))
    with pytest.raises(ConfigError, match="--layers is 0; expected 1 or more"):
        fresh_student(llama(), Widths(), layers=0)
