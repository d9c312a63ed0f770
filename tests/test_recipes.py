"""The recipes of the paper's experiments: their settings, and your own settings that win over them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import llama, save

from todi_offline.cache.reader import Cache
from todi_offline.errors import ConfigError
from todi_offline.training.recipes import RECIPES
from todi_offline.training.run import StudentConfig, TrainConfig, load_train_config, train, training_arguments

NEEDED = {"student": "s", "cache": "c", "out": "run"}


def resolved(*, file: Path | None = None, **settings: Any) -> TrainConfig:
    return load_train_config(file, NEEDED | settings)


def test_the_settings_equal_the_papers_scripts() -> None:
    """The scripts are those that the authors published."""
    config = resolved(recipe="paper")
    chosen = config.distillation
    assert (chosen.divergence, chosen.beta, chosen.temperature, chosen.kd_weight) == ("todi", 1, 2, 0.5)
    assert config.lora.lora_r == 0
    arguments = training_arguments(config)
    assert arguments.num_train_epochs == 20
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (5e-4, 0.01, 1)
    assert arguments.optim.startswith("adamw_torch")
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (arguments.bf16, arguments.seed, arguments.warmup_steps) == (True, 10, 0)

    config = resolved(recipe="paper-lora")
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (256, 8, 0.1)
    arguments = training_arguments(config)
    assert (arguments.num_train_epochs, arguments.learning_rate) == (10, 1e-3)
    assert config.distillation == chosen


def test_the_learning_rate_follows_torchs_cosine_schedule() -> None:
    from transformers import get_scheduler

    arguments = training_arguments(resolved(recipe="paper"))
    rates = []
    for kind in ("ours", "torch"):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=arguments.learning_rate)
        if kind == "ours":
            scheduler = get_scheduler(
                arguments.lr_scheduler_type,
                optimizer,
                num_warmup_steps=arguments.warmup_steps,
                num_training_steps=50,
                scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
            )
        else:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-7)
        rates.append([])
        for _ in range(50):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)
    assert rates[0][-1] == pytest.approx(1e-7)


def test_settings_of_a_file_or_a_call_win_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "paper"\n[distillation]\ntemperature = 1.0\nkd_weight = 0.3\n'
        "[lora]\nlora_r = 4\n[trainer]\nlearning_rate = 1e-3\nseed = 1\n"
    )
    config = resolved(file=file, kd_weight=0.7, seed=2, max_steps=5)
    assert (config.distillation.temperature, config.distillation.kd_weight, config.lora.lora_r) == (1, 0.7, 4)
    assert config.distillation.beta == 1
    assert (config.trainer["learning_rate"], config.trainer["seed"], config.trainer["max_steps"]) == (1e-3, 2, 5)
    assert (config.trainer["weight_decay"], config.trainer["num_train_epochs"]) == (0.01, 20)
    assert resolved(file=file, recipe="paper-lora").lora.lora_r == 4
    assert resolved(file=file, recipe="paper-lora").lora.lora_alpha == 8


def test_a_different_schedule_does_not_inherit_the_arguments_of_the_recipes_own() -> None:
    assert "lr_scheduler_kwargs" not in resolved(recipe="paper", lr_scheduler_type="linear").trainer
    given = resolved(recipe="paper", lr_scheduler_kwargs={"min_lr": 1e-5}).trainer
    assert (given["lr_scheduler_type"], given["lr_scheduler_kwargs"]) == ("cosine_with_min_lr", {"min_lr": 1e-5})


def test_a_step_has_32_sequences_for_any_number_of_processes_and_any_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolved(recipe="paper").trainer["gradient_accumulation_steps"] == 8
    assert resolved(recipe="paper", per_device_train_batch_size=16).trainer["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "4")  # the paper's own: 4 sequences, twice, on 4 devices
    assert resolved(recipe="paper").trainer["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 processes with batches of 4 cannot make up the 32 sequences a step"):
        resolved(recipe="paper")
    assert resolved(recipe="paper", gradient_accumulation_steps=5).trainer["gradient_accumulation_steps"] == 5


def test_a_recipe_is_refused_beside_a_train_config() -> None:
    bare = TrainConfig(student=StudentConfig(student="s"), cache=("c",), out=Path("r"), recipe="paper")
    for base, settings in ((bare, {}), (dataclasses.replace(bare, recipe=None), {"recipe": "paper"})):
        with pytest.raises(ConfigError, match="sets only settings that you have not set, and a TrainConfig sets all"):
            load_train_config(base, settings)
    assert load_train_config(resolved(recipe="paper"), {"beta": 2.0}).distillation.beta == 2


def test_without_a_recipe_nothing_is_set() -> None:
    assert resolved().trainer == {}
    assert resolved().distillation.temperature == 1


@pytest.mark.parametrize("name", ["papr", "", ["paper"]])
def test_an_unknown_recipe_is_refused_with_a_list_of_the_recipes(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"expected one of {', '.join(RECIPES)}$"):
        resolved(recipe=name)


def test_the_resolved_settings_are_saved_with_the_student(cache: Cache, tmp_path: Path) -> None:
    folder = save(llama(seed=1), tmp_path / "student")
    settings = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "gradient_accumulation_steps": 1}
    summary = train(str(folder), cache.root, tmp_path / "run", recipe="paper", **settings)
    assert summary.num_steps == 1
    saved = json.loads((tmp_path / "run" / "todi_config.json").read_text())
    assert saved["recipe"] == "paper"
    assert saved["distillation"]["temperature"] == 2
    expected = {name: value for name, value in RECIPES["paper"].items() if name not in saved["distillation"]}
    assert saved["trainer"] == expected | settings
