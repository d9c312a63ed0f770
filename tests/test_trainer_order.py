"""The order in which the trainer takes the sequences; a resumed run keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import gpt2, llama
from support.tiny_runs import assert_same_weights, seen_by, trainer_of
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from todi_offline.cache.reader import Cache
from todi_offline.training.stream import CacheDataset, ShuffledOrder


def test_every_epoch_holds_every_sequence_once_in_an_order_of_its_own(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache, num_train_epochs=3)
    trainer.train()
    seen = seen_by(trainer, cache)
    assert len(seen) == 3 * 6
    epochs = [seen[:6], seen[6:12], seen[12:]]
    for number, epoch in enumerate(epochs):
        order = ShuffledOrder(len(cache), 42)
        order.set_epoch(number)
        expected = list(order)
        assert epoch == [set(expected[start : start + 4]) for start in range(0, 21, 4)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_incomplete_batch_is_dropped_on_request(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache, num_train_epochs=1, dataloader_drop_last=True)
    trainer.train()
    assert [len(members) for members in seen_by(trainer, cache)] == [4] * 5


def test_the_epoch_reaches_the_order_although_a_wrapper_may_not_pass_it_on(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache)
    sampler = trainer._get_train_sampler()
    batches = iter(DataLoader(CacheDataset(cache), 4, sampler=sampler, collate_fn=trainer.data_collator))
    trainer.state.epoch = 2.0
    trainer.batches, _ = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    order = ShuffledOrder(len(cache), 42)
    order.set_epoch(2)
    assert seen_by(trainer, cache) == [set(list(order)[:4])]


def test_the_order_follows_the_data_seed_where_there_is_one(cache: Cache, tmp_path: Path) -> None:
    orders = []
    for seeds in ({"seed": 3}, {"seed": 5, "data_seed": 3}, {"seed": 5}):
        trainer = trainer_of(tmp_path, cache, max_steps=2, **seeds)
        trainer.train()
        orders.append(seen_by(trainer, cache))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("batch_size", "accumulated"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_micro_batches_are_one_large_batch(
    batch_size: int, accumulated: int, cache: Cache, tmp_path: Path
) -> None:
    whole = trainer_of(tmp_path / "a", cache, per_device_train_batch_size=8, num_train_epochs=2, optim="sgd")
    whole.train()
    parts = trainer_of(
        tmp_path / "b",
        cache,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=2,
        optim="sgd",
    )
    parts.train()
    assert len({len(batch["labels"]) for batch in parts.batches[:accumulated]}) > 1  # else a mean of means would do
    for mine, theirs in zip(parts.state.log_history[:6], whole.state.log_history[:6], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert_same_weights(parts.model, whole.model, 1e-5)


class StopAfter(TrainerCallback):
    """Ends a run as a kill would, but for the checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def dropping_out(seed: int = 1) -> Any:
    return gpt2(seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


@pytest.mark.parametrize("build", [pytest.param(llama, marks=pytest.mark.slow), dropping_out])
@pytest.mark.parametrize("stop", [2, 6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    build: Callable[..., Any], stop: int, cache: Cache, tmp_path: Path
) -> None:
    """To the last digit, in the middle of an epoch (of six steps) and between two."""
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "whole", cache, build(seed=1), **(settings | {"save_strategy": "no"}))
    whole.train()
    first = trainer_of(tmp_path / "parts", cache, build(seed=1), callbacks=[StopAfter(stop)], **settings)
    first.train()
    assert first.state.global_step == stop
    second = trainer_of(tmp_path / "parts", cache, build(seed=9), **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 12
    assert seen_by(first, cache) + seen_by(second, cache) == seen_by(whole, cache)
    assert first.losses + second.losses == whole.losses
    assert_same_weights(second.model, whole.model)


def test_a_run_resumed_with_smaller_micro_batches_keeps_its_order(cache: Cache, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", cache, per_device_train_batch_size=8, num_train_epochs=2)
    whole.train()
    first = trainer_of(tmp_path / "parts", cache, per_device_train_batch_size=8, callbacks=[StopAfter(1)], **settings)
    first.train()
    second = trainer_of(
        tmp_path / "parts", cache, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    second.train(resume_from_checkpoint=True)
    steps = seen_by(first, cache) + joined(seen_by(second, cache), [2, 2, 2, 2, 2])
    assert steps == seen_by(whole, cache)
    assert_same_weights(second.model, whole.model, 1e-4)


def joined(members: list[set[int]], counts: list[int]) -> list[set[int]]:
    assert sum(counts) == len(members)
    iterator = iter(members)
    return [set().union(*(next(iterator) for _ in range(count))) for count in counts]
