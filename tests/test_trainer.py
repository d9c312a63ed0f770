"""Training: its loss, its models, and its batches."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import DECODER, VOCAB, build, gpt2, llama, mamba
from support.tiny_runs import QUIET, assert_same_weights, seen_by, trainer_of
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Example, Examples
from todi_offline.errors import DivergedError
from todi_offline.losses import DistillationConfig, sparse_divergence
from todi_offline.losses.schedule import scheduled
from todi_offline.targets.sparse import SparseTargets
from todi_offline.teacher.in_transformers import Teacher, as_teacher
from todi_offline.training.stream import CacheDataset, Collator, ShuffledOrder, batch_targets

# What is trained on


def test_the_loss_equals_that_of_separate_sequences(cache: Cache, tmp_path: Path) -> None:
    config = DistillationConfig(temperature=2.0, kd_weight=0.3)
    trainer = trainer_of(tmp_path, cache, distillation=config, max_steps=1)
    trainer.train()
    model, summed, num_targets = llama(seed=1), 0.0, 0
    for number in seen_by(trainer, cache)[0]:
        ids = torch.from_numpy(cache[number].token_ids.astype(np.int64))
        columns = torch.from_numpy(np.flatnonzero(cache[number].target_mask))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, columns]
        cross_entropy = nn.functional.cross_entropy(logits, ids[columns + 1], reduction="sum")
        targets = SparseTargets.from_numpy(cache[number].targets)
        kd = sparse_divergence(logits, targets, "todi", temperature=2.0).sum()
        summed += float(0.7 * cross_entropy + 0.3 * kd)
        num_targets += len(columns)
    assert trainer.losses[0] == pytest.approx(summed / num_targets, rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(summed / num_targets, rel=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_without_distillation_training_equals_transformers_trainer(
    build: Callable[..., Any], cache: Cache, tmp_path: Path
) -> None:
    """The same losses and the same weights as plain supervised fine-tuning of padded batches in the same order."""
    settings = QUIET | {"per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd", "max_steps": 4}
    sft = DistillationConfig(kd_weight=0.0)
    ours = trainer_of(tmp_path / "a", cache, build(seed=1), distillation=sft, **settings)
    ours.train()
    order = iter(ShuffledOrder(len(cache), 42))

    def padded(sequences: list[CachedSequence]) -> dict[str, Tensor]:
        longest = max(len(sequence.token_ids) for sequence in sequences)
        input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        labels = torch.full_like(input_ids, -100)
        for row, sequence in enumerate(sequences):
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
            input_ids[row, : len(ids)] = ids
            supervised = torch.from_numpy(np.flatnonzero(sequence.target_mask)) + 1
            labels[row, supervised] = ids[supervised]
        mask = torch.arange(longest) < torch.tensor([[len(sequence.token_ids)] for sequence in sequences])
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}

    class Ordered(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return list(order)

    args = TrainingArguments(
        output_dir=str(tmp_path / "b"),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        **settings,
    )
    plain = Ordered(model=build(seed=1), args=args, train_dataset=CacheDataset(cache), data_collator=padded)
    plain.train()
    for mine, theirs in zip(ours.state.log_history[:4], plain.state.log_history[:4], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["loss"] == pytest.approx(mine["cross_entropy"], rel=1e-4)
    assert_same_weights(ours.model, plain.model, 1e-6)


def test_a_packed_row_is_read_without_a_cache_and_without_a_mask(cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    """With either, transformers may let the sequences of a row meet."""
    trainer = trainer_of(tmp_path, cache, eval_dataset=heldout, max_steps=2)
    given: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    assert len(given) > 2
    for kwargs in given:
        assert kwargs["use_cache"] is False
        assert set(kwargs) - {"use_cache"} == {"input_ids", "position_ids"}


def test_a_model_that_lets_packed_sequences_meet_gets_a_row_for_each(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="todi_offline"):
        trainer = trainer_of(tmp_path, cache, mamba(), max_steps=1)
    assert trainer.data_collator == Collator(pack=False)
    assert "MambaForCausalLM does not isolate packed sequences" in caplog.text
    trainer.train()
    assert len(trainer.batches[0]["input_ids"]) == 4
    assert trainer_of(tmp_path, cache).data_collator == Collator(pack=True)


class CountingLlama(LlamaForCausalLM):
    """Takes no position_ids and counts them itself, as models do whose code comes with them."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_takes_no_position_ids_gets_a_row_for_each_and_learns_the_same(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counting = CountingLlama(llama().config)
    counting.load_state_dict(llama(seed=1).state_dict())
    with caplog.at_level("INFO", logger="todi_offline"):
        trainer = trainer_of(tmp_path / "counting", cache, counting, max_steps=3)
    assert trainer.data_collator == Collator(pack=False, positions=False)
    assert "CountingLlama takes no position_ids" in caplog.text
    packed = trainer_of(tmp_path / "packed", cache, max_steps=3)
    for each in (trainer, packed):
        each.train()
    for mine, theirs in zip(trainer.state.log_history[:3], packed.state.log_history[:3], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("vocab", [151_936, 262_144])
def test_a_vocabulary_beyond_two_bytes_is_captured_and_trained_on(
    vocab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BigTokenizer(vocab)
    shape = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    generator = np.random.default_rng(0)
    mask = np.arange(20) % 2 == 0
    examples = Examples.from_list(
        Example(str(n), "made", generator.integers(60_000, vocab, 20).astype(np.uint32), mask) for n in range(4)
    )
    capture(as_teacher(llama(**shape), tokenizer), examples, tmp_path / "cache", k=8, shard_tokens=4096)
    cache = open_cache(tmp_path / "cache")
    ids = np.concatenate([sequence.targets.ids for sequence in cache])
    assert ids.dtype == np.uint32
    assert ids.max() > 65_536
    before = llama(seed=1, **shape)
    trainer = trainer_of(tmp_path / "run", cache, llama(seed=1, **shape), tokenizer=tokenizer, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.losses[0])
    assert not torch.equal(trainer.model.lm_head.weight, before.lm_head.weight)


class BigTokenizer(PreTrainedTokenizerFast):
    """The tiny tokenizer with as many ids as are asked for."""

    def __init__(self, vocab: int) -> None:
        super().__init__(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
        self.num_ids = vocab

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.num_ids)}


def test_teacher_and_student_may_pad_their_embeddings_unlike(examples: Examples, tmp_path: Path) -> None:
    capture(as_teacher(llama(vocab_size=VOCAB + 64), tiny_tokenizer()), examples, tmp_path / "cache", k=8)
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.vocab_size == VOCAB
    losses = []
    for padding in (0, 128):
        model = llama(seed=1, vocab_size=VOCAB + padding)
        with torch.no_grad():  # the same model, but for rows that nobody should look at
            narrow = llama(seed=1).state_dict()
            for name, value in model.state_dict().items():
                value[: len(narrow[name])] = narrow[name]
        trainer = trainer_of(tmp_path / "run", cache, model, max_steps=3)
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Ways to train


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_mixture_of_experts_trains_with_its_routers_loss_as_transformers_does(
    is_fused: bool, cache: Cache, tmp_path: Path
) -> None:
    sft = DistillationConfig(kd_weight=0.0)
    trainer = trainer_of(tmp_path, cache, mixtral(), distillation=sft, per_device_train_batch_size=1, max_steps=1)
    trainer.head = dataclasses.replace(trainer.head, is_linear=is_fused)
    trainer.train()
    model = mixtral().train()
    batch = trainer.batches[0]
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["target_positions"] + 1] = batch["labels"]
    expected = model(input_ids=batch["input_ids"], labels=labels)
    assert trainer.losses[0] == pytest.approx(expected.loss.item(), rel=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["router_loss"] == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["cross_entropy"] + 0.5 * logged["router_loss"], rel=1e-4)


def mixtral() -> Any:
    config = DECODER | {"num_local_experts": 4, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    return build(MixtralConfig(**config), seed=1)


def test_the_routers_losses_of_micro_batches_are_averaged(cache: Cache, tmp_path: Path) -> None:
    """Each by its targets: accumulation does not make the routers' loss larger."""
    trainer = trainer_of(
        tmp_path, cache, mixtral(), max_steps=1, gradient_accumulation_steps=3, per_device_train_batch_size=2
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    half = (logged["cross_entropy"] + logged["kd"]) / 2
    assert logged["loss"] == pytest.approx(half + 0.5 * logged["router_loss"], rel=1e-4)


class Spoil(TrainerCallback):
    """Makes a weight infinite after a step, as a learning rate that is too high does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, _: Any, state: Any, __: Any, model: nn.Module, **___: Any) -> None:
        if state.global_step == self.after:
            with torch.no_grad():
                model.lm_head.weight.fill_(math.nan)


@pytest.mark.parametrize(
    "settings", [{"logging_steps": 2}, {"logging_strategy": "no"}, {"save_strategy": "steps", "save_steps": 1}]
)
def test_a_loss_that_is_not_finite_ends_the_run(settings: dict[str, Any], cache: Cache, tmp_path: Path) -> None:
    """At the next log or checkpoint, or else at the end."""
    values = {"logging_strategy": "no"} | settings if "save_steps" in settings else settings
    trainer = trainer_of(tmp_path, cache, callbacks=[Spoil(after=2)], max_steps=6, **values)
    with pytest.raises(DivergedError, match=r"the loss of step 3 is not a finite number.*learning_rate \(0.01\)"):
        trainer.train()
    if "save_steps" in settings:
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        assert trainer.state.global_step == 3


@pytest.mark.parametrize("steps", [2, 6])
def test_a_finished_run_that_is_resumed_takes_no_step(steps: int, cache: Cache, tmp_path: Path) -> None:
    """In the middle of an epoch, of six steps, and at its end."""
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
    first = trainer_of(tmp_path, cache, **settings)
    first.train()
    again = trainer_of(tmp_path, cache, llama(seed=9), **settings)
    assert again.train(resume_from_checkpoint=True).global_step == steps
    assert not again.losses
    assert_same_weights(again.model, first.model)


def test_bfloat16_gives_losses_near_those_of_float32(cache: Cache, tmp_path: Path) -> None:
    plain = trainer_of(tmp_path / "a", cache, max_steps=3, learning_rate=1e-3)
    plain.train()
    mixed = trainer_of(tmp_path / "b", cache, max_steps=3, learning_rate=1e-3, bf16=True)
    mixed.train()
    assert mixed.losses == pytest.approx(plain.losses, rel=2e-2)
    assert mixed.losses != plain.losses


@pytest.mark.parametrize("is_persistent", [False, True])
def test_workers_give_the_batches_of_the_main_process(
    is_persistent: bool, cache: Cache, heldout: Cache, tmp_path: Path
) -> None:
    plain = trainer_of(tmp_path / "a", cache, num_train_epochs=2)
    plain.train()
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": is_persistent}
    worked = trainer_of(tmp_path / "b", cache, eval_dataset=heldout, num_train_epochs=2, **settings)
    worked.train()
    assert seen_by(worked, cache) == seen_by(plain, cache)
    assert worked.losses == plain.losses
    assert worked.evaluate()["eval_kd"] == pytest.approx(plain.evaluate(heldout)["eval_kd"], rel=1e-6)


def test_a_smaller_k_and_another_tail_are_trained_on_as_asked(cache: Cache, tmp_path: Path) -> None:
    losses = {}
    for changes in ({}, {"k": 4}, {"tail": "bucket"}, {"tail": "none"}, {"divergence": "forward_kl"}, {"beta": 3.0}):
        config = dataclasses.replace(DistillationConfig(kd_weight=1.0), **changes)
        trainer = trainer_of(tmp_path, cache, distillation=config, max_steps=1)
        trainer.train()
        batch = trainer.batches[0]
        with torch.no_grad():
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            logits = llama(seed=1)(**inputs).logits.flatten(0, 1)[batch["target_positions"]]
        objective = {"beta": config.beta, "k": config.k, "tail": config.tail}
        expected = sparse_divergence(logits, batch_targets(batch, cache), config.divergence, **objective).mean()
        assert trainer.losses[0] == pytest.approx(float(expected), rel=1e-5)
        losses[str(changes)] = trainer.losses[0]
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("schedule", ["linear-up", "linear-down", "wsd"])
def test_the_weight_of_kd_follows_its_schedule(schedule: str, cache: Cache, tmp_path: Path) -> None:
    config = DistillationConfig(kd_weight=0.8, kd_schedule=schedule)
    trainer = trainer_of(tmp_path, cache, distillation=config, max_steps=4, learning_rate=0.0)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for step, (loss, row) in enumerate(zip(trainer.losses, logged, strict=True)):
        weight = scheduled(config, (step + 0.5) / 4).kd_weight
        assert loss == pytest.approx((1 - weight) * row["cross_entropy"] + weight * row["kd"], rel=1e-5)
    before = trainer.evaluate(cache)
    assert before["eval_loss"] == pytest.approx(0.2 * before["eval_cross_entropy"] + 0.8 * before["eval_kd"], rel=1e-5)


def test_selected_positions_are_trained_on_alike_with_and_without_the_head(cache: Cache, tmp_path: Path) -> None:
    losses = []
    for kd_weight in (0.5, 1.0):
        config = DistillationConfig(kd_weight=kd_weight, positions="tip:0.5")
        for has_head in (True, False):
            trainer = trainer_of(tmp_path, cache, distillation=config, max_steps=2)
            trainer.head = dataclasses.replace(trainer.head, is_linear=has_head)
            trainer.train()
            losses.append(trainer.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[3], rel=1e-4)


def test_a_cache_of_samples_alone_trains_a_student(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    capture(teacher, examples, tmp_path / "samples", k=0, tail_samples=6)
    cache = open_cache(tmp_path / "samples")
    config = DistillationConfig(divergence="forward_kl", kd_weight=1.0)
    losses = []
    for has_head in (True, False):
        trainer = trainer_of(tmp_path, cache, distillation=config, max_steps=8)
        trainer.head = dataclasses.replace(trainer.head, is_linear=has_head)
        trainer.train()
        losses.append(trainer.losses)
        batch = trainer.batches[0]
        assert batch["ids"].shape[1] == 0
        assert batch["tail_ids"].shape[1] == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
