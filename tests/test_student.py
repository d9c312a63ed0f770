"""What becomes a student: a teacher cut by depth, a model with adapters; and whether packing is safe with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.tiny_models import cohere, gemma2, gpt2, granite, llama, mamba, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from todi_offline.errors import ConfigError, ModelError
from todi_offline.student import LoraSettings, add_lora, make_student, packs_apart, prune_depth, spaced_layers

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
def test_spaced_layers_refuse_what_cannot_be_kept(keep: int) -> None:
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
    model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ModelError, match="has 2 lists of 2 modules, expected one"):
        prune_depth(model, [0])


def test_a_saved_student_loads_with_its_teachers_tokenizer(tmp_path: Path) -> None:
    teacher = llama(num_hidden_layers=4)
    folder = save(teacher, tmp_path / "teacher")
    assert make_student(str(folder), tmp_path / "two", layers=2) == [0, 3]
    assert make_student(str(folder), tmp_path / "list", keep=[0, 1, 3]) == [0, 1, 3]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "list")
    torch.testing.assert_close(logits(loaded), logits(prune_depth(teacher, [0, 1, 3]).eval()), rtol=0, atol=0)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_a_student_needs_a_number_or_a_list_of_layers_and_an_empty_folder(tmp_path: Path) -> None:
    folder = str(save(llama(), tmp_path / "teacher"))
    for options in ({}, {"layers": 1, "keep": [0]}):
        with pytest.raises(ConfigError, match="name either a number of layers"):
            make_student(folder, tmp_path / "student", **options)
    with pytest.raises(ConfigError, match=r"teacher is not empty"):
        make_student(folder, tmp_path / "teacher", layers=1)
    assert not (tmp_path / "student").exists()


def test_lora_leaves_nothing_else_to_train() -> None:
    model = add_lora(llama(), LoraSettings(lora_r=4, lora_target_modules=("q_proj", "v_proj")))
    assert isinstance(model, PeftModel)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    everywhere = add_lora(llama(), LoraSettings(lora_r=4, lora_target_modules=("all-linear",)))
    assert sum(parameter.requires_grad for parameter in everywhere.parameters()) == 2 * 2 * 7


def test_without_a_rank_there_is_no_lora() -> None:
    model = llama()
    assert add_lora(model, LoraSettings()) is model


def test_lora_on_modules_that_do_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LoRA finds no module to adapt.*--lora-target-modules"):
        add_lora(llama(), LoraSettings(lora_r=4, lora_target_modules=("no_such",)))


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
