"""A student with some of the teacher's channels, heads and neurons equals them, for every family, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import llama, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import todi_offline.student.width
from benchmarks._zoo import logits_of_parts, tiny_config, tiny_model
from todi_offline.errors import ConfigError, ModelError
from todi_offline.student.importance import Importance, activation_importance
from todi_offline.student.parts import Sizes, width_parts
from todi_offline.student.width import Widths, most_important, narrow_model, prune_width, resolve_sizes

TOKENS = torch.arange(3, 43).view(2, 20)
SEQUENCES = [torch.arange(start, start + 24) for start in (3, 90, 300)]
HALF = Widths(hidden=16, heads=2, mlp=40)
TEACHER = Sizes(hidden=32, heads=8, kv_heads=4, mlp=64, head_dim=8)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("asked", "heads", "kv_heads"),
    [
        (Widths(), 8, 4),
        (Widths(heads=4), 4, 2),  # whole groups
        (Widths(kv_heads=1), 2, 1),
        (Widths(heads=4, kv_heads=4), 4, 4),  # a head of each group
        (Widths(heads=3, kv_heads=3), 3, 3),
    ],
)
def test_heads_that_share_keys_go_together(asked: Widths, heads: int, kv_heads: int) -> None:
    sizes = resolve_sizes(asked, TEACHER)
    assert (sizes.heads, sizes.kv_heads, sizes.hidden, sizes.mlp, sizes.head_dim) == (heads, kv_heads, 32, 64, 8)


@pytest.mark.parametrize(
    "asked", [{"heads": 3}, {"heads": 1}, {"heads": 6, "kv_heads": 2}, {"heads": 3, "kv_heads": 2}]
)
def test_heads_that_cannot_be_shared_out_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"cannot share .* at most 2 as in the teacher; choose"):
        resolve_sizes(Widths(**asked), TEACHER)


@pytest.mark.parametrize(("name", "option"), [("hidden", "--hidden"), ("kv_heads", "--kv-heads"), ("mlp", "--mlp")])
@pytest.mark.parametrize("value", [0, -1, 1000])
def test_a_size_beyond_the_teachers_is_refused(name: str, option: str, value: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"{option} is {value}, but the teacher has \d+; choose 1 to \d+, or --fresh"
    ):
        resolve_sizes(Widths(**{name: value}), TEACHER)


def test_the_most_important_are_kept_in_their_order_and_groups_whole() -> None:
    importance = Importance(
        hidden=torch.tensor([5.0, 1, 4, 2, 3]),
        heads=torch.tensor([[9.0, 0, 2, 3, 4, 4.5], [1, 1, 0, 9, 7, 7]]),
        neurons=torch.tensor([[0.0, 2, 1], [3, 2, 1]]),
    )
    teacher = Sizes(hidden=5, heads=6, kv_heads=3, mlp=3, head_dim=1)
    groups = most_important(importance, teacher, Sizes(hidden=3, heads=4, kv_heads=2, mlp=2, head_dim=1))
    assert groups.hidden.tolist() == [0, 2, 4]
    assert groups.neurons.tolist() == [[1, 2], [0, 1]]
    assert groups.kv_heads.tolist() == [[0, 2], [1, 2]]
    assert groups.heads.tolist() == [[0, 1, 4, 5], [2, 3, 4, 5]]
    single = most_important(importance, teacher, Sizes(hidden=3, heads=2, kv_heads=2, mlp=2, head_dim=1))
    assert single.kv_heads.tolist() == [[0, 2], [1, 2]]
    assert single.heads.tolist() == [[0, 5], [3, 4]]


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "ministral",
        "qwen2",  # biases
        "qwen3",  # norms of heads
        "smollm3",  # layers without positions, tied
        "gemma",  # embeddings times the root of the hidden size, tied
        "gemma2",  # that, four norms a layer, soft caps
        "gemma3_text",  # that, and two kinds of rotary embeddings
        "granite",  # scales of its own
        "cohere2",  # norms that subtract a mean, attention beside the MLP
        "nemotron",  # no gate; norms with biases
        "exaone4",
        "seed_oss",  # biases of some projections
        "apertus",  # an activation with parameters
    ],
)
def test_a_student_of_any_such_family_equals_the_kept_parts_of_its_teacher(family: str, tmp_path: Path) -> None:
    teacher = tiny_model(family)
    with torch.no_grad():
        for parameter in teacher.parameters():  # norms and biases are alike in a fresh model
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    parts = width_parts(teacher)
    sizes = resolve_sizes(HALF, parts.sizes)
    kept = most_important(activation_importance(teacher, parts, SEQUENCES), parts.sizes, sizes)
    narrow_model(teacher, parts, sizes, kept).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert width_parts(student).sizes == sizes
    torch.testing.assert_close(logits(student), logits_of_parts(teacher, parts, kept, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_model_of_all_its_parts_is_itself() -> None:
    teacher = tiny_model("qwen3")
    student = prune_width(teacher, Widths(hidden=32, heads=4, mlp=64), SEQUENCES)
    torch.testing.assert_close(logits(student.eval()), logits(teacher), rtol=0, atol=0)


def test_a_student_keeps_the_parts_with_an_effect() -> None:
    teacher = llama()
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.up_proj.weight[::2] = 0
            layer.self_attn.v_proj.weight[:8] = 0
    student = prune_width(teacher, Widths(heads=2, mlp=32), SEQUENCES)
    torch.testing.assert_close(logits(student.eval()), logits(teacher), rtol=1e-5, atol=1e-5)


def test_a_student_shares_no_weight_with_its_teacher() -> None:
    teacher = llama()
    before = logits(teacher)
    with torch.no_grad():
        for parameter in prune_width(teacher, Widths(mlp=64), SEQUENCES).parameters():
            parameter.zero_()
    assert torch.equal(logits(teacher), before)
    assert teacher.config.intermediate_size == 64


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_others_apart(tied: bool, tmp_path: Path) -> None:
    student = prune_width(llama(tie_word_embeddings=tied), HALF, SEQUENCES)
    save(student, tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_student_in_bfloat16_has_the_bits_of_its_teacher() -> None:
    teacher = tiny_model("smollm3").bfloat16()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = prune_width(teacher, Widths(mlp=64, hidden=32, heads=2), SEQUENCES)
    assert {value.dtype for value in student.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(student.model.layers[2].mlp.up_proj.weight, before["model.layers.2.mlp.up_proj.weight"])
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)


def test_a_student_generates_as_its_teacher_does() -> None:
    teacher = llama()
    teacher.generation_config.update(eos_token_id=[2, 5], max_length=99)
    student = prune_width(teacher, HALF, SEQUENCES)
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()


def test_sizes_that_a_config_refuses_are_refused_before_a_sequence_is_read() -> None:
    def sequences() -> Any:
        raise AssertionError("a sequence was read")
        yield

    with pytest.raises(
        ModelError, match=r"^LlamaForCausalLM cannot have 23 channels, .*: The hidden size \(23\) is not a multiple"
    ):
        prune_width(llama(), Widths(hidden=23), sequences())


def test_a_family_whose_heads_follow_from_the_hidden_size_says_so() -> None:
    with pytest.raises(ModelError, match=r"would be \(16, 32\), in the teacher .*; choose --hidden as 8 times --heads"):
        prune_width(tiny_model("stablelm"), Widths(heads=2), SEQUENCES)
    assert prune_width(tiny_model("stablelm"), Widths(heads=2, hidden=16), SEQUENCES)


def test_heads_that_compute_in_pairs_are_refused() -> None:
    with pytest.raises(ModelError, match="DiffLlama requires `num_key_value_heads` to be even"):
        prune_width(tiny_model("diffllama"), Widths(heads=2), SEQUENCES)
    with pytest.raises(
        ModelError, match=r"does not compute what the kept parts compute: what model\.layers\.0 adds .* off by"
    ):
        prune_width(tiny_model("diffllama", num_attention_heads=8, num_key_value_heads=4), Widths(heads=4), SEQUENCES)


def test_a_student_whose_logits_are_not_those_of_its_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todi_offline.student.width, "config_of_sizes", lambda *_: changed)
    changed = tiny_config("llama", intermediate_size=40, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with pytest.raises(
        ModelError,
        match=r"does not compute what the kept parts compute: what model\.layers\.0 adds .* off by \d+\.\d% of the",
    ):
        prune_width(tiny_model("llama"), Widths(mlp=40), SEQUENCES)


def test_an_attention_window_longer_than_the_text_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todi_offline.student.width, "config_of_sizes", lambda *_: changed)
    changed = tiny_config("gemma2", sliding_window=200, intermediate_size=40)
    with pytest.raises(ModelError, match=r"sliding_window of layer 0's self_attn would be 200 and is 100"):
        prune_width(tiny_model("gemma2", sliding_window=100), Widths(mlp=40), SEQUENCES)
