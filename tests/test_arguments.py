"""Trainer arguments that `ToDiTrainer` would ignore or misread are refused by name, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from support.tiny_runs import QUIET, trainer_of
from transformers import TrainingArguments

import todi_offline.training.run
from todi_offline.cache.reader import Cache
from todi_offline.errors import ConfigError
from todi_offline.training.run import load_train_config, train, training_arguments
from todi_offline.training.trainer import ToDiTrainer

IGNORED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
}


@pytest.mark.parametrize("name", IGNORED)
def test_an_argument_that_would_be_ignored_is_refused(name: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*, which ToDiTrainer does not support; leave it out: "):
        trainer_of(tmp_path, cache, **{name: IGNORED[name]})


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_a_packed_batch_is_not_cut(name: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"accelerator_config sets {name}, which ToDiTrainer does not support"):
        trainer_of(tmp_path, cache, accelerator_config={name: True})


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [("forward_kl", None, True), ("eval_one_kd", True, True), ("forward_kl", False, False), ("loss", None, False)],
)
def test_the_student_that_is_farthest_from_the_teacher_is_not_the_best(
    name: str, value: bool | None, is_refused: bool, cache: Cache, tmp_path: Path
) -> None:
    given = {"metric_for_best_model": name, "greater_is_better": value}
    if is_refused:
        with pytest.raises(ConfigError, match=f"greater_is_better is True, so the student with the largest {name} wo"):
            trainer_of(tmp_path, cache, **given)
    else:
        assert trainer_of(tmp_path, cache, **given).args.greater_is_better is False


@pytest.mark.parametrize(
    "name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"]
)
def test_a_callable_that_would_be_ignored_is_refused(name: str, cache: Cache, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(ConfigError, match=f"ToDiTrainer does not use {name}; "):
        ToDiTrainer(llama(), args, cache, processing_class=tiny_tokenizer(), **{name: lambda *_: None})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bf16", "maybe", "bf16 is 'maybe'; expected true or false"),
        ("bf16", 1, "bf16 is 1; expected true or false"),
        ("max_steps", 2.5, "max_steps is 2.5; expected int"),
        ("max_steps", True, "max_steps is True; expected int"),
        ("learning_rate", "fast", "learning_rate is 'fast'; expected float"),
        ("data_seed", "x", r"data_seed is 'x'; expected int \| None"),
        ("dataloader_num_workers", None, "dataloader_num_workers is None; expected int"),
        ("deepspeed", "ds.json", "deepspeed is 'ds.json', which ToDiTrainer does not support; .*use DDP, or FSDP"),
        ("resume_from_checkpoint", "x", "resume_from_checkpoint is 'x', .*use --resume"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor is 0.1"),
        ("bf16_full_eval", True, "bf16_full_eval is True, .*would round the weights that are trained and saved"),
        ("accelerator_config", {"dispatch_batches": True}, "accelerator_config sets dispatch_batches"),
        ("output_dir", "elsewhere", r"output_dir is 'elsewhere'; name the folder of the run as out \(--out\)"),
        ("group_by_length", True, "group_by_length is True, which ToDiTrainer does not support; .*packed"),
        ("learning_rate", float("nan"), "learning_rate is nan; expected 0 or more"),
        ("learning_rate", -1, "learning_rate is -1; expected 0 or more"),
        ("adam_beta1", 1.0, "adam_beta1 is 1.0; expected 0 or more, and less than 1"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size is 0; expected 1 or more"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps is 0; expected 1 or more"),
        ("num_train_epochs", 0, "num_train_epochs is 0; expected more than 0"),
        ("max_steps", 0, "max_steps is 0; expected 1 or more, or -1"),
        ("eval_strategy", "steps", r"eval_strategy is 'steps', and there is no data to evaluate on; .*--eval-cache"),
        ("save_strategy", "best", "save_strategy is 'best'; name the metric"),
        ("load_best_model_at_end", True, "transformers refuses these training arguments: .*Save strategy: .*STEPS"),
    ],
)
def test_a_setting_is_refused_before_the_student_is_loaded(
    name: str, value: Any, message: str, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer().save_pretrained(tokens := str(tmp_path / "student"))
    monkeypatch.setattr(todi_offline.training.run, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        train(tokens, cache, tmp_path / "run", use_cpu=True, **{name: value})
    assert not (tmp_path / "run").exists()


def test_integers_paths_and_lists_are_accepted_for_floats_strings_and_tuples(tmp_path: Path) -> None:
    given = {"learning_rate": 1, "logging_steps": 5, "report_to": (), "data_seed": None, "run_name": tmp_path}
    arguments = training_arguments(
        load_train_config(None, {"student": "s", "cache": "c", "out": tmp_path, "use_cpu": True} | given)
    )
    assert arguments.learning_rate == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"metric_for_best_model": "forward_kl"}, False),
        ({"metric_for_best_model": "loss"}, False),
        ({"metric_for_best_model": "student_kept_mass"}, True),
        ({"metric_for_best_model": "student_kept_mass", "greater_is_better": False}, False),
        ({}, None),
    ],
)
def test_less_of_a_distance_is_better(given: dict[str, Any], expected: bool | None, tmp_path: Path) -> None:
    config = load_train_config(None, {"student": "s", "cache": "c", "out": tmp_path, "use_cpu": True} | given)
    assert training_arguments(config).greater_is_better is expected


def test_deepspeed_in_accelerates_config_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="accelerate is configured for DeepSpeed, which ToDiTrainer does not support"):
        train("student", cache, tmp_path / "run", use_cpu=True)
