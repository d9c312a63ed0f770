"""A student with some of the teacher's layers equals these layers, for every family, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import cohere, gemma2, gpt2, granite, llama, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import todi_offline.student.depth
from benchmarks._zoo import logits_of_layers, tiny_config, tiny_model
from todi_offline.errors import ConfigError, ModelError
from todi_offline.student import prune_depth, spaced_layers

TOKENS = torch.arange(3, 43).view(2, 20)

Build = Callable[..., Any]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("num_layers", "keep", "kept"),
    [
        (30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        (4, 2, [0, 3]),
        (4, 3, [0, 2, 3]),
        (4, 4, [0, 1, 2, 3]),
        (4, 1, [0]),
    ],
)
def test_spaced_layers_are_these(num_layers: int, keep: int, kept: list[int]) -> None:
    assert spaced_layers(num_layers, keep) == kept


def test_spaced_layers_keep_the_first_and_the_last_and_none_twice() -> None:
    for num_layers in range(2, 40):
        for keep in range(2, num_layers + 1):
            layers = spaced_layers(num_layers, keep)
            assert (layers[0], layers[-1], len(set(layers))) == (0, num_layers - 1, keep)
            assert layers == sorted(layers)


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_spaced_layers_refuse_impossible_numbers(keep: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot keep {keep} of 4 layers; choose 1 to 4"):
        spaced_layers(4, keep)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere])
def test_a_model_of_all_its_layers_is_itself(build: Build) -> None:
    model = build()
    torch.testing.assert_close(logits(prune_depth(model, [0, 1]).eval()), logits(model), rtol=0, atol=0)


def test_a_student_of_some_layers_is_its_teacher_without_the_others() -> None:
    teacher = llama(num_hidden_layers=4)
    student = prune_depth(teacher, [0, 2]).eval()
    assert student.config.num_hidden_layers == 2
    composed = llama(num_hidden_layers=4)
    composed.model.layers = nn.ModuleList([composed.model.layers[0], composed.model.layers[2]])
    composed.config.num_hidden_layers = 2
    torch.testing.assert_close(logits(student), logits(composed), rtol=0, atol=0)
    assert not torch.allclose(logits(student), logits(teacher), atol=0.1)


def test_layers_come_in_the_order_asked_for() -> None:
    student = prune_depth(llama(num_hidden_layers=3), [2, 0])
    teacher = llama(num_hidden_layers=3)
    for new, old in enumerate((2, 0)):
        found = student.model.layers[new].mlp.up_proj.weight
        assert torch.equal(found, teacher.model.layers[old].mlp.up_proj.weight)


def test_a_student_shares_no_weight_with_its_teacher() -> None:
    teacher = llama()
    before = logits(teacher)
    with torch.no_grad():
        for parameter in prune_depth(teacher, [0]).parameters():
            parameter.zero_()
    assert torch.equal(logits(teacher), before)
    assert teacher.config.num_hidden_layers == 2


def test_the_kind_of_attention_stays_with_its_layer() -> None:
    teacher = gemma2(num_hidden_layers=4)
    kinds = teacher.config.layer_types
    assert prune_depth(teacher, [1, 2, 3]).config.layer_types == kinds[1:]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_others_apart(tied: bool, tmp_path: Path) -> None:
    student = prune_depth(llama(num_hidden_layers=3, tie_word_embeddings=tied), [0, 2])
    save(student, tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_layers_that_do_not_exist_are_refused() -> None:
    for layers in ([0, 2], [-1], []):
        with pytest.raises(ConfigError, match=r"the model has layers 0 to 1"):
            prune_depth(llama(), layers)


def test_an_architecture_whose_layers_cannot_be_told_is_refused() -> None:
    model = llama()
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ModelError, match="has 2 lists of 2 modules, expected one"):
        prune_depth(model, [0])


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("smollm3", [1, 2, 3]),  # no_rope_layers, an entry a layer
        ("llama4_text", [0, 2, 3]),  # that, and moe_layers, numbers of layers
        ("llama4_text", [0, 2]),
        ("qwen3_moe", [0, 2, 3]),  # mlp_only_layers, numbers of layers
        ("qwen3_moe", [1, 3]),
        ("qwen2_moe", [0, 1, 3]),  # decoder_sparse_step: every second layer is a mixture of experts
        ("falcon_h1", [0, 2, 3]),  # its layer_types follow from other values
        ("mamba2", [0, 2, 3]),
        ("jamba", [1, 2, 3]),  # a period and an offset
        ("recurrent_gemma", [0, 2, 3]),  # kinds that are repeated
        ("gpt_neo", [0, 2, 3]),  # attention_layers, an entry a layer under another name
        ("deepseek_v3", [1, 2]),  # how many layers at the beginning have no experts
        ("gemma3n_text", [0, 1, 3]),  # embeddings by layer, in one tensor
        ("gemma4_text", [0, 1, 3]),  # values of single layers, by their number
        ("xlstm", [0, 2, 3]),  # the number of layers under two names
    ],
)
def test_a_student_of_any_family_is_its_teachers_layers_one_after_another(
    family: str, layers: list[int], tmp_path: Path
) -> None:
    teacher = tiny_model(family)
    prune_depth(teacher, layers).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert student.config.num_hidden_layers == len(layers)
    expected = logits_of_layers(teacher, layers, TOKENS)
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_compute_by_their_number_are_refused() -> None:
    assert prune_depth(tiny_model("diffllama"), [0, 1, 2])
    with pytest.raises(ModelError, match=r"lambda_init of layer 2's self_attn would be 0.355\d* and is 0.470\d*"):
        prune_depth(tiny_model("diffllama"), [0, 2])


def test_layers_that_hold_a_part_for_each_of_the_others_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"cannot describe the layers \[0, 2, 3\]: with it model\.layers\.\S+ would be absent"
    ):
        prune_depth(tiny_model("zamba2"), [0, 2, 3])


def test_a_model_that_transformers_cannot_make_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todi_offline.student.depth, "config_of_layers", lambda *_: changed)
    changed = tiny_config("smollm3", num_hidden_layers=2)
    changed.no_rope_layers = [1]
    with pytest.raises(
        ModelError, match=r"SmolLM3ForCausalLM cannot be made of the layers \[0, 2\]: list index out of"
    ):
        prune_depth(tiny_model("smollm3"), [0, 2])


def test_a_student_whose_logits_are_not_those_of_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todi_offline.student.depth, "config_of_layers", lambda *_: changed)
    changed = tiny_config("llama", num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with pytest.raises(
        ModelError,
        match=r"does not compute what these layers compute one after another: its logits are off by \d+\.\d% of",
    ):
        prune_depth(tiny_model("llama"), [0, 3])


def test_an_attention_window_longer_than_the_text_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todi_offline.student.depth, "config_of_layers", lambda *_: changed)
    teacher = tiny_model("gemma2", sliding_window=100)
    changed = tiny_config("gemma2", sliding_window=200, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"sliding_window of layer 0's self_attn would be 200 and is 100"):
        prune_depth(teacher, [0, 3])


def test_a_student_in_bfloat16_has_the_bits_of_its_teacher(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = prune_depth(teacher, [0, 2]).eval()
    assert student.dtype == torch.bfloat16
    assert student.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32  # as this family keeps it
    assert torch.equal(logits(student), logits_of_layers(teacher, [0, 2], TOKENS))


def test_a_student_generates_as_its_teacher_does(tmp_path: Path) -> None:
    teacher = llama(num_hidden_layers=3)
    teacher.generation_config.update(eos_token_id=[2, 5], max_length=99)
    assert prune_depth(teacher, [0, 2]).generation_config.to_dict() == teacher.generation_config.to_dict()
    teacher.generation_config.temperature = 0.6  # without do_sample, which transformers loads and does not save
    student = prune_depth(teacher, [0, 2])
    save(student, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 5]
