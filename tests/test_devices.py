"""Dtypes and devices on a simulated accelerator; see `support/elsewhere.py`."""

import contextlib
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.utils.backend_registration as backends
from support.flash import with_flash
from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from support.tiny_runs import trainer_of
from torch import Tensor, nn

import todi_offline.targets.host_copy
import todi_offline.tuning
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.reader import Cache
from todi_offline.data import DataConfig, load_examples
from todi_offline.errors import TeacherOutputError
from todi_offline.losses import DIVERGENCES, DistillationConfig, distillation_loss, fused_linear_distill
from todi_offline.models.head import tried_head
from todi_offline.targets.rows import queue_chunks
from todi_offline.targets.sparse import SparseTargets, teacher_targets
from todi_offline.teacher.in_transformers import as_teacher, queue_targets, targets_of
from todi_offline.training.trainer import ToDiTrainer

if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this release of torch knows no devices made in Python", allow_module_level=True)
from support.elsewhere import ELSEWHERE, Elsewhere, Elsewheres, Event, settle, without_reads

NUM_TARGETS, WIDTH, VOCAB, K, NUM_SAMPLES = 6, 8, 600, 5, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NUM_TARGETS)
UNIFORMS = torch.rand(NUM_TARGETS, NUM_SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def targets_on(device: torch.device | str) -> tuple[SparseTargets, Tensor]:
    logits = 3 * normal(NUM_TARGETS, VOCAB, seed=1)
    logits[0] = logits[0].round()  # with ties, which a path of its own decides
    targets, labels, _ = teacher_targets(logits.to(device), LABELS.to(device), K, uniforms=UNIFORMS.to(device))
    return targets, labels


def here(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, Elsewhere)
    return tensor.inner


def test_the_device_refuses_tensors_of_the_cpu() -> None:
    with Elsewheres():
        there = torch.ones(3, device=ELSEWHERE)
        assert there.device == ELSEWHERE
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        torch.testing.assert_close(here(there.add_(1)), torch.full((3,), 2.0))


def test_the_device_notices_reads_by_the_host() -> None:
    with Elsewheres():
        there, numbers = torch.ones(3, device=ELSEWHERE), torch.arange(2).to(ELSEWHERE)
        reads = [lambda: there[0].item(), lambda: bool(there[0]), there.nonzero, lambda: there[there > 0], there.tolist]
        for read in [*reads, there.cpu, lambda: torch.equal(there, there)]:
            read()
            with without_reads(), pytest.raises(RuntimeError, match="reads from the device"):
                read()
        with without_reads():
            torch.testing.assert_close(here((2 * there)[numbers]), torch.full((2,), 2.0))


def test_targets_are_taken_where_the_logits_are() -> None:
    expected, expected_labels = targets_on("cpu")
    with Elsewheres():
        targets, label_logprobs = targets_on(ELSEWHERE)
    for name in ("ids", "logprobs", "tail_logsumexp", "tail_ids", "tail_logprobs"):
        assert torch.equal(here(getattr(targets, name)), getattr(expected, name))
    assert torch.equal(here(label_logprobs), expected_labels)


def losses(device: torch.device | str, config: DistillationConfig) -> list[Tensor]:
    """Return the fused loss, its gradients, its sums, and the readable loss."""
    leaves = [
        x.to(device).detach().requires_grad_()
        for x in (normal(NUM_TARGETS, WIDTH, seed=2), normal(VOCAB + 1, WIDTH, seed=3), normal(VOCAB + 1, seed=4))
    ]
    hidden, weight, bias = leaves
    labels, count = LABELS.to(device), torch.tensor(NUM_TARGETS).to(device)
    targets, _ = targets_on(device)
    settings = {"num_targets": count, "vocab_size": VOCAB, "chunk_targets": 4}
    with without_reads():
        loss, sums = fused_linear_distill(hidden, weight, labels, targets, config, bias=bias, **settings)
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2))
    logits = (hidden @ weight.T + bias).detach()[:, :VOCAB]
    readable, _ = distillation_loss(logits, labels, targets, config, num_targets=count)
    return [loss.detach(), *gradients, *sums.values(), readable]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_and_gradients_are_computed_where_the_student_is(divergence, tail, temperature) -> None:
    config = DistillationConfig(divergence=divergence, tail=tail, temperature=temperature)
    with Elsewheres():
        there = [here(tensor) for tensor in losses(ELSEWHERE, config)]
    for found, expected in zip(there, losses("cpu", config), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_teacher_reads_where_it_is() -> None:
    tokenizer = tiny_tokenizer()
    examples = load_examples(DataConfig(limit=3, max_length=64, max_prompt_length=32), tokenizer)
    batch, settings = [examples[index] for index in range(3)], CacheSettings(k=8)
    expected = targets_of(as_teacher(llama(), tokenizer), batch, settings)
    with Elsewheres():
        model = llama()
        settle(model)
        found = targets_of(as_teacher(model, tokenizer), batch, settings)
    for rows, same in zip(found, expected, strict=True):
        assert np.array_equal(rows.ids, same.ids)
        np.testing.assert_allclose(rows.logprobs, same.logprobs, atol=1e-5)
        np.testing.assert_allclose(rows.tail_logsumexp, same.tail_logsumexp, atol=1e-5)


@pytest.fixture
def copies_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device copies to the host behind its back, as CUDA devices do."""
    stream = SimpleNamespace(record_event=lambda: Mock(spec=torch.cuda.Event, synchronize=Event().synchronize))
    monkeypatch.setattr(todi_offline.targets.host_copy, "QUEUED_DEVICES", (ELSEWHERE.type,))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)


@pytest.mark.usefixtures("copies_are_queued")
@pytest.mark.parametrize("encoding", ["root8", "bf16_logit"])
@pytest.mark.parametrize(("k", "tail_samples"), [(8, 0), (8, 4), (0, 4)])
def test_targets_are_queued_without_a_read_from_the_first_layer_to_the_copies(
    k: int, tail_samples: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first layer, transformers reads once whether sequences are packed."""
    tokenizer = tiny_tokenizer()
    examples = load_examples(DataConfig(limit=3, max_length=64, max_prompt_length=32), tokenizer)
    batch = [examples[index] for index in range(3)]
    settings = CacheSettings(k=k, tail_samples=tail_samples, encoding=encoding)
    monkeypatch.setattr(todi_offline.tuning, "chunk_bytes", lambda *_: 16 * 4 * VOCAB)
    expected = targets_of(as_teacher(llama(), tokenizer), batch, settings)
    with Elsewheres(), contextlib.ExitStack() as stack:
        model = llama()
        settle(model)
        teacher = as_teacher(model, tokenizer)
        model.model.layers[0].register_forward_pre_hook(lambda *_: stack.enter_context(without_reads()) and None)
        queued = queue_targets(teacher, batch, settings)
        assert len(queued.rows.chunks) > 1
        assert all(copy.copies["largest"].isnan().all() for copy in queued.rows.chunks)
        found = queued.read()
    for rows, same in zip(found, expected, strict=True):
        for name, values in same.arrays().items():
            np.testing.assert_allclose(getattr(rows, name), values, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("copies_are_queued")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_logit_is_named_when_the_copies_are_read(value: float) -> None:
    logits = normal(2 * NUM_TARGETS, VOCAB, seed=1)
    logits[NUM_TARGETS + 2, 7] = value
    with Elsewheres():
        chunks = torch.split(logits.to(ELSEWHERE), NUM_TARGETS)
        with without_reads():
            queued = queue_chunks(chunks, LABELS.repeat(2), UNIFORMS.repeat(2, 1), CacheSettings(k=K, tail_samples=3))
            with pytest.raises(TeacherOutputError) as raised:
                queued.read()
    assert raised.value.row == NUM_TARGETS + 2


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_step_is_made_where_the_student_is_and_its_layers_and_loss_read_nothing_from_there(
    is_fused: bool, attention: str, cache: Cache, tmp_path: Path
) -> None:
    """From the first layer to the end of backward: before it, transformers reads once whether sequences are packed."""

    def student() -> Any:
        return with_flash(llama(seed=1).bfloat16()) if attention == "flash" else llama(seed=1)

    def step(trainer: ToDiTrainer, device: torch.device | str) -> list[Tensor]:
        trainer.head = dataclasses.replace(trainer.head, is_linear=is_fused)
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        inputs = {name: value.to(device) if name != "longest" else value for name, value in batches[0].items()}
        scale, count = torch.full((), 2.0).to(device), count.to(device)
        with contextlib.ExitStack() as stack:
            first = trainer.model.model.layers[0]
            first.register_forward_pre_hook(lambda *_: stack.enter_context(without_reads()) and None)
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
            (scale * loss).backward()  # as a GradScaler does
        return [loss.detach(), *(weight.grad for weight in trainer.model.parameters())]

    expected = step(trainer_of(tmp_path, cache, student()), "cpu")
    trainer = trainer_of(tmp_path, cache, student())
    assert trainer.data_collator.bounds == (attention == "flash")
    with Elsewheres():
        settle(trainer.model)
        found = step(trainer, ELSEWHERE)
    tolerance = 2e-2 if attention == "flash" else 1e-5
    for there, same in zip(found, expected, strict=True):
        torch.testing.assert_close(here(there), same, atol=tolerance, rtol=max(tolerance, 1e-4))


def test_a_head_on_another_device_than_the_logits_runs_apart() -> None:
    """As accelerate spreads a teacher: the last device has the head, the first gets the logits back."""
    model, tokens, positions = llama(), torch.arange(3, 23)[None], torch.tensor([0, 7, 19])
    with Elsewheres():
        settle(model.lm_head)
        model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].to(ELSEWHERE),))
        model.register_forward_hook(_logits_to_cpu)
        head = tried_head(model)
        assert head.runs_apart
        with torch.no_grad():
            (logits,) = head.chunks(positions, 100, input_ids=tokens)
    assert logits.device == ELSEWHERE
    with torch.no_grad():
        expected = llama()(input_ids=tokens).logits[0, positions]
    torch.testing.assert_close(here(logits), expected, rtol=1e-5, atol=1e-5)


def _logits_to_cpu(_: nn.Module, __: Any, output: Any) -> Any:
    output.logits = output.logits.to("cpu")
    return output
