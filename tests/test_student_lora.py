"""LoRA on a student: only adapters are trained, and unknown modules are refused."""

import pytest
from peft import PeftModel
from support.tiny_models import llama

from todi_offline.errors import ConfigError, ModelError
from todi_offline.student import LoraSettings, add_lora


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


@pytest.mark.parametrize(("name", "value"), [("lora_r", -1), ("lora_dropout", 1.0), ("lora_dropout", float("nan"))])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; expected"):
        LoraSettings(**{name: value})
