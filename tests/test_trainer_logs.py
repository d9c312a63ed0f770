"""What the trainer logs and evaluates."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from support.tiny_runs import QUIET, Noting, trainer_of
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import todi_offline.training.meters
import todi_offline.training.trainer
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import ConfigError, TargetsError
from todi_offline.losses import DistillationConfig, distillation_loss
from todi_offline.teacher.in_transformers import Teacher
from todi_offline.training.stream import CacheDataset, Collator, batch_targets

MEANS = (
    "cross_entropy",
    "kd",
    "forward_kl",
    "reverse_kl",
    "teacher_kept_mass",
    "student_kept_mass",
    "share_a_above_half",
    "tail_share",
)


def test_logged_means_are_over_targets(cache: Cache, tmp_path: Path) -> None:
    """Over all that were seen since the last log, at the weights that each step had; so the rate is zero here."""
    trainer = trainer_of(
        tmp_path, cache, max_steps=4, logging_steps=2, gradient_accumulation_steps=2, learning_rate=0.0
    )
    trainer.train()
    for logged, batches in zip(trainer.state.log_history[:2], (trainer.batches[:4], trainer.batches[4:]), strict=True):
        expected = means_of(llama(seed=1), batches, cache)
        for name in MEANS:
            assert logged[name] == pytest.approx(expected[name], rel=1e-4), name
        assert logged["tokens_per_second"] > 0
        assert 0 <= logged["data_wait_share"] < 1
    assert trainer.num_tokens_trained == sum(int(batch["num_tokens"]) for batch in trainer.batches)


def test_the_time_of_evaluations_is_no_time_of_training(
    cache: Cache, heldout: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal seconds
            seconds += 1

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            nonlocal seconds
            seconds += 1000

    for module in (todi_offline.training.trainer, todi_offline.training.meters):
        monkeypatch.setattr(module, "perf_counter", lambda: seconds)
    settings = {"eval_dataset": heldout, "eval_strategy": "steps", "eval_steps": 1, "callbacks": [Clock()]}
    trainer = trainer_of(tmp_path, cache, max_steps=3, **settings)
    trainer.evaluate()
    trainer.train()
    logged = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [int(batch["num_tokens"]) for batch in trainer.batches]


def test_a_batch_that_was_too_large_is_not_counted(cache: Cache, tmp_path: Path) -> None:
    """auto_find_batch_size halves the batch, and begins again."""

    class Small(Noting):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > 1:
                self.batches.clear()
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

    values = QUIET | {
        "per_device_train_batch_size": 8,
        "auto_find_batch_size": True,
        "max_steps": 3,
        "logging_steps": 3,
    }
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.0, **values)
    trainer = Small(llama(seed=1), args, cache, processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.num_tokens_trained == sum(int(batch["num_tokens"]) for batch in trainer.batches)
    expected = means_of(llama(seed=1), trainer.batches, cache)
    assert trainer.state.log_history[0]["kd"] == pytest.approx(expected["kd"], rel=1e-4)


def test_what_fills_up_packed_rows_counts_as_padding(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache, num_train_epochs=1, include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == cache.num_tokens.sum()


def test_a_loss_logged_by_other_code_is_logged_unchanged(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache)
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[0] == {"loss": 1.0, "epoch": 0, "step": 0}


def means_of(model: Any, batches: list[dict[str, Tensor]], cache: Cache) -> dict[str, float]:
    """Return the means, recomputed from all logits of each batch."""
    sums: dict[str, float] = dict.fromkeys([*MEANS, "num_targets"], 0.0)
    for batch in batches:
        with torch.no_grad():
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            logits = model(**inputs).logits.flatten(0, 1)[batch["target_positions"]]
        _, found = distillation_loss(logits, batch["labels"], batch_targets(batch, cache))
        sums = {name: sums[name] + float(found[name]) for name in sums}
    return {name: value / sums["num_targets"] for name, value in sums.items()}


def test_evaluation_reports_means_over_the_held_out_cache(cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    config = DistillationConfig(kd_weight=0.25)
    trainer = trainer_of(tmp_path, cache, eval_dataset=heldout, distillation=config, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    batches = [Collator(pack=False)([sequence]) for sequence in heldout]
    expected = means_of(llama(seed=1), batches, heldout)
    for name in MEANS:
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4), name
    loss = 0.75 * expected["cross_entropy"] + 0.25 * expected["kd"]
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    trainer.evaluate(CacheDataset(cache))
    assert trainer.evaluate()["eval_kd"] == metrics["eval_kd"]  # nothing is carried over from the one before


def test_a_cache_that_is_evaluated_later_counts_each_sequence_once(
    cache: Cache, heldout: Cache, tmp_path: Path
) -> None:
    """Seven sequences in batches of four: the last batch has an empty place."""
    given = trainer_of(tmp_path, cache, eval_dataset=heldout, per_device_eval_batch_size=4)
    expected = {name: value for name, value in given.evaluate().items() if "second" not in name and "time" not in name}
    trainer = trainer_of(tmp_path, cache, per_device_eval_batch_size=4)
    found = trainer.evaluate(heldout)
    assert {name: found[name] for name in expected} == expected
    named = trainer.evaluate(MappingProxyType({"one": heldout, "two": cache}))
    assert named["eval_one_kd"] == expected["eval_kd"] != named["eval_two_kd"]
    assert trainer.predict(heldout).metrics["test_kd"] == expected["eval_kd"]
    alone = trainer_of(tmp_path, None, per_device_eval_batch_size=4)
    assert alone.evaluate(heldout)["eval_kd"] == expected["eval_kd"]


def test_workers_that_stay_read_the_cache_that_is_evaluated(cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    """transformers keeps their loader under one name for all data sets."""
    expected = trainer_of(tmp_path, None).evaluate(cache)["eval_kd"]
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = trainer_of(tmp_path, None, eval_dataset=heldout, **workers)
    assert trainer.evaluate()["eval_kd"] != expected == trainer.evaluate(cache)["eval_kd"]
    assert trainer.evaluate()["eval_kd"] != expected


def test_a_cache_that_is_evaluated_later_is_checked_too(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    capture(teacher, examples, tmp_path / "small", k=8, temperatures=[1.0], tail_samples=0)
    small = open_cache(tmp_path / "small")
    trainer = trainer_of(tmp_path, None, distillation=DistillationConfig(temperature=2.0))
    for evaluate in (trainer.evaluate, trainer.predict, lambda cache: trainer.evaluate({"named": cache})):
        with pytest.raises(TargetsError, match="temperature 2; these targets have 1"):
            evaluate(small)
    with pytest.raises(ConfigError, match="list is not a cache; ToDiTrainer reads what `open_cache` returns"):
        trainer.evaluate([1, 2])


def test_evaluation_in_the_middle_of_training_disturbs_nothing(cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    plain = trainer_of(tmp_path / "a", cache, max_steps=4)
    plain.train()
    evaluated = trainer_of(
        tmp_path / "b",
        cache,
        eval_dataset={"one": heldout, "two": cache},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluated.train()
    assert evaluated.losses == plain.losses
    history = [entry for entry in evaluated.state.log_history if "loss" in entry]
    for mine, theirs in zip(history, plain.state.log_history, strict=False):
        assert mine["cross_entropy"] == theirs["cross_entropy"]
    names = {name for entry in evaluated.state.log_history for name in entry}
    assert {"eval_one_forward_kl", "eval_two_forward_kl"} <= names


def test_callbacks_and_tensorboard_get_the_logs(cache: Cache, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: list[dict[str, float]] = []

    class Noticing(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            logged.append(logs)

    trainer = trainer_of(tmp_path, cache, callbacks=[Noticing()], max_steps=2, report_to="tensorboard")
    trainer.train()
    assert [entry["kd"] for entry in logged[:2]] == [entry["kd"] for entry in trainer.state.log_history[:2]]
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    found = [event.value for event in events.Scalars("train/forward_kl")]
    assert found == pytest.approx([entry["forward_kl"] for entry in logged[:2]])


def test_tensorboard_has_all_curves_in_one_folder_of_the_run_though_an_evaluation_comes_first(
    cache: Cache, heldout: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer = trainer_of(tmp_path / "run", cache, eval_dataset=heldout, max_steps=2, report_to="tensorboard")
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert {path.parent for path in tmp_path.rglob("events.out*")} == {tmp_path / "run" / "runs"}
    events = EventAccumulator(str(tmp_path / "run" / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2]
