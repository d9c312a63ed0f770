"""Tests that need a GPU: `pytest -m cuda`; skipped without one.

`TODI_DEVICE=cpu pytest -m cuda` runs all of it that a CPU can run, which shows that the tests themselves work.
"""

import contextlib
import copy
import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from support.tiny_runs import trainer_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import TeacherOutputError
from todi_offline.losses import DistillationConfig, distillation_loss, fused_linear_distill, passes
from todi_offline.targets.sparse import SparseTargets, teacher_targets
from todi_offline.targets.top_k import top_k
from todi_offline.teacher.in_transformers import as_teacher, queue_targets, targets_of

DEVICE = torch.device(os.environ.get("TODI_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="make one GPU visible: CUDA_VISIBLE_DEVICES=0"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, when it compiles
]
needs_cuda = pytest.mark.skipif(not IS_CUDA, reason="a CPU has nothing of it")

NUM_TARGETS, WIDTH, VOCAB, K, NUM_SAMPLES = 96, 64, 5000, 16, 8
PRECISIONS = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NUM_TARGETS)
UNIFORMS = torch.rand(NUM_TARGETS, NUM_SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def targets_on(
    device: torch.device | str, temperatures: tuple[float, ...] = (1.0, 2.0)
) -> tuple[SparseTargets, Tensor]:
    logits = 3 * normal(NUM_TARGETS, VOCAB, seed=1)
    logits[0] = logits[0].round()  # with ties, which a path of its own decides
    targets, labels, _ = teacher_targets(
        logits.to(device), LABELS.to(device), K, temperatures=temperatures, uniforms=UNIFORMS.to(device)
    )
    return targets, labels


def test_targets_equal_the_cpus() -> None:
    expected, expected_labels = targets_on("cpu")
    found, labels = targets_on(DEVICE)
    assert found.ids.device.type == DEVICE.type
    found = found.to("cpu")
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tail_logsumexp, expected.tail_logsumexp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(labels.cpu(), expected_labels, rtol=1e-5, atol=1e-5)
    assert found.tail_ids is not None
    assert expected.tail_ids is not None
    assert (found.tail_ids == expected.tail_ids).float().mean() >= 0.99  # a sum's last bit may choose the next id
    same = found.tail_ids == expected.tail_ids
    torch.testing.assert_close(found.tail_logprobs[same], expected.tail_logprobs[same], rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[torch.dtype]:
    """Within, what is computed in this precision; yields the dtype of the weights."""
    if name != "autocast":
        yield getattr(torch, name)
        return
    with torch.autocast(DEVICE.type, torch.bfloat16):
        yield torch.float32


def losses(precision: str, config: DistillationConfig, *, fused: bool, chunk: int | None = 40) -> list[Tensor]:
    """Return the loss, its gradients and its sums."""
    with precision_of(precision) as dtype:
        hidden, weight = (
            (scale * normal(size, WIDTH, seed=seed)).to(DEVICE, dtype).requires_grad_()
            for size, scale, seed in ((NUM_TARGETS, 1.0, 2), (VOCAB + 3, 0.3, 3))
        )
        labels, (targets, _) = LABELS.to(DEVICE), targets_on(DEVICE)
        if fused:
            loss, sums = fused_linear_distill(
                hidden, weight, labels, targets, config, vocab_size=VOCAB, chunk_targets=chunk
            )
        else:
            logits = torch.nn.functional.linear(hidden, weight)[:, :VOCAB]
            loss, sums = distillation_loss(logits, labels, targets, config)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight)), *sums.values()]


def assert_close(found: list[Tensor], expected: list[Tensor], precision: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= precision * theirs.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "tail"), [("todi", "sampled"), ("todi", "bucket"), ("forward_kl", "sampled")])
def test_the_fused_loss_is_the_readable_one(divergence: str, tail: str, temperature: float, precision: str) -> None:
    config = DistillationConfig(divergence=divergence, tail=tail, temperature=temperature)
    found, expected = (losses(precision, config, fused=fused) for fused in (True, False))
    assert_close(found, expected, PRECISIONS[precision])


def test_losses_and_gradients_equal_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [tensor.cpu() for tensor in losses("float32", DistillationConfig(), fused=True)]
    monkeypatch.setitem(globals(), "DEVICE", torch.device("cpu"))
    assert_close(found, losses("float32", DistillationConfig(), fused=True), 1e-3)  # TF32 is off unless asked for


@pytest.fixture
def fresh_passes() -> Iterator[None]:
    passes.compiled_for_cuda.cache_clear()
    yield
    passes.compiled_for_cuda.cache_clear()


@pytest.mark.usefixtures("fresh_passes")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_compiled_passes_compute_what_is_written(temperature: float) -> None:
    functions = [passes.compiled_for_cuda(f, DEVICE.type) for f in (passes.exponentiate_piece, passes.combine_piece)]
    if IS_CUDA and passes.exponentiate_piece in functions:
        pytest.skip("there is no triton, or no C compiler")
    power = max(temperature, 1 / temperature)
    for num_targets in (1, 7, 130):
        logits = 10 * normal(num_targets, 3001, seed=num_targets).to(DEVICE)
        logits[:, 5] = -torch.inf
        plain, least = logits.clone(), logits[:, 0].clone()
        factors = normal(2, num_targets, seed=1).to(DEVICE)
        found = functions[0](logits, least, max(temperature, 1.0), power)
        torch.testing.assert_close(found, passes.exponentiate_piece(plain, least, max(temperature, 1.0), power))
        torch.testing.assert_close(logits, plain)
        functions[1](logits, *factors, power)
        passes.combine_piece(plain, *factors, power)
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_passes")
def test_without_a_c_compiler_the_loss_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = losses("float32", DistillationConfig(temperature=2.0), fused=True)
    passes.compiled_for_cuda.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        found = losses("float32", DistillationConfig(temperature=2.0), fused=True)
    assert_close(found, expected, 1e-4)
    if IS_CUDA and importlib.util.find_spec("triton"):
        assert "is not compiled, for there is no C compiler" in caplog.text


@needs_cuda
def test_the_logits_of_all_targets_never_exist() -> None:
    num_targets, vocab = 8192, 128_256
    hidden = torch.randn(num_targets, WIDTH, device=DEVICE, requires_grad=True)
    weight = torch.randn(vocab, WIDTH, device=DEVICE, requires_grad=True)
    rows, _ = targets_on(DEVICE)
    index = torch.arange(num_targets, device=DEVICE) % NUM_TARGETS
    targets, labels = rows[index], index.clone()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_distill(hidden, weight, labels, targets)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < num_targets * vocab * 4 / 2


def captured(examples: Examples, folder: Path, device: torch.device | str, **settings: Any) -> Cache:
    teacher = as_teacher(llama().to(device), tiny_tokenizer())
    capture(teacher, examples, folder, k=8, tail_samples=4, codec="fast", shard_tokens=4096, **settings)
    return open_cache(folder)


@pytest.mark.parametrize(("encoding", "step"), [("f16", 2e-2), ("root8", 0.15)])
def test_a_capture_equals_the_cpus_up_to_rounding(
    examples: Examples, tmp_path: Path, encoding: str, step: float
) -> None:
    found = captured(examples, tmp_path / "there", DEVICE, encoding=encoding)
    expected = captured(examples, tmp_path / "here", "cpu", encoding=encoding)
    assert len(found) == len(expected)
    same, num_rows = 0, 0
    for number in range(len(expected)):
        mine, theirs = found[number], expected[number]
        assert np.array_equal(mine.token_ids, theirs.token_ids)
        assert np.array_equal(mine.target_mask, theirs.target_mask)
        rows = (mine.targets.ids == theirs.targets.ids).all(-1)
        same, num_rows = same + int(rows.sum()), num_rows + len(rows)
        np.testing.assert_allclose(mine.targets.logprobs[rows], theirs.targets.logprobs[rows], atol=step)
        np.testing.assert_allclose(mine.targets.label_logprob, theirs.targets.label_logprob, atol=step)
    assert same >= 0.99 * num_rows  # of nearly equal logprobs the order may differ


def test_a_capture_of_the_same_machine_has_the_same_bytes(examples: Examples, tmp_path: Path) -> None:
    for name in ("first", "second"):
        captured(examples, tmp_path / name, DEVICE)
    files = [
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("c/*")
            if file.is_file()
        }
        for name in ("first", "second")
    ]
    assert files[0]
    assert files[0] == files[1]


@contextlib.contextmanager
def without_reads() -> Iterator[None]:
    """Within, the host does not wait for the device."""
    if not IS_CUDA:  # nothing waits for it
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("k", "tail_samples"), [(8, 0), (8, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_a_capture_is_queued_without_a_read(
    examples: Examples, dtype: torch.dtype, k: int, tail_samples: int
) -> None:
    """From the first layer on: before it transformers reads whether sequences are packed."""
    teacher = as_teacher(llama().to(DEVICE, dtype), tiny_tokenizer())
    batch, settings = [examples[index] for index in range(4)], CacheSettings(k=k, tail_samples=tail_samples)
    expected = targets_of(teacher, batch, settings)  # kernels are made, and the memory for the copies is pinned
    with contextlib.ExitStack() as stack:
        teacher.model.model.layers[0].register_forward_pre_hook(
            lambda *_: stack.enter_context(without_reads()) and None
        )
        queued = queue_targets(teacher, batch, settings)
    for found, same in zip(queued.read(), expected, strict=True):
        for name, values in same.arrays().items():
            np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_logit_of_a_queued_batch_is_named(examples: Examples, value: float) -> None:
    model = llama().to(DEVICE)
    teacher, batch = as_teacher(model, tiny_tokenizer()), [examples[index] for index in range(2)]
    positions = np.flatnonzero(batch[1].target_mask)

    def breaking(_: Any, __: Any, output: Tensor) -> None:
        output.flatten(0, -2)[int(batch[0].target_mask.sum()) + 2, 5] = value

    handle = model.lm_head.register_forward_hook(breaking)
    queued = queue_targets(teacher, batch, CacheSettings(k=8))
    handle.remove()
    with pytest.raises(TeacherOutputError, match=f"example '{batch[1].id}' at position {positions[2]} hold NaN"):
        queued.read()
    queue_targets(teacher, batch, CacheSettings(k=8)).read()  # the device goes on


def test_the_top_k_of_every_row_are_settled_as_on_a_cpu() -> None:
    for dtype, vocab, k in ((torch.bfloat16, 151_936, 64), (torch.float32, 5000, 16), (torch.bfloat16, 300, 8)):
        logits = (3 * normal(8, vocab, seed=5)).to(dtype)
        for found, expected in zip(top_k(logits.to(DEVICE), k), top_k(logits, k), strict=True):
            assert torch.equal(found.cpu(), expected)


STEPS: dict[str, Any] = {
    "max_steps": 2,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "use_cpu": not IS_CUDA,
}


def trained(out: Path, cache: Cache, **settings: Any) -> Any:
    trainer = trainer_of(out, cache, **STEPS | settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_steps_equal_the_cpus(accumulation: int, cache: Cache, tmp_path: Path) -> None:
    found = trained(tmp_path / "there", cache, gradient_accumulation_steps=accumulation)
    expected = trained(tmp_path / "here", cache, gradient_accumulation_steps=accumulation, use_cpu=True)
    assert next(found.model.parameters()).device.type == DEVICE.type
    assert found.head.is_linear
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name].cpu(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_fused", [True, False])
def test_training_in_bfloat16_is_near(is_fused: bool, cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "there", cache, **STEPS, bf16=True)
    if not is_fused:
        trainer.head = type(trainer.head)(trainer.model)  # which is not known to be linear
    trainer.train()
    expected = trained(tmp_path / "here", cache)
    assert trainer.losses == pytest.approx(expected.losses, rel=2e-2)


@needs_cuda
def test_a_gradient_scaler_keeps_the_loss(cache: Cache, tmp_path: Path) -> None:
    found = trained(tmp_path / "there", cache, fp16=True)
    expected = trained(tmp_path / "here", cache)
    assert found.losses == pytest.approx(expected.losses, rel=2e-2)


@needs_cuda
@pytest.mark.parametrize("is_fused", [True, False])
def test_the_host_reads_nothing_in_a_step(is_fused: bool, cache: Cache, tmp_path: Path) -> None:
    """From the last norm on: before it transformers reads to find out what is packed."""
    trainer = trainer_of(tmp_path, cache, **STEPS)
    if not is_fused:
        trainer.head = type(trainer.head)(trainer.model)
    for is_first in (True, False):  # in the first step kernels are made
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, DEVICE)
        inputs = trainer._prepare_inputs(batches[0])
        compute_loss = super(type(trainer), trainer).compute_loss  # whose loss nobody notes
        with contextlib.ExitStack() as stack:
            if not is_first:
                norm = trainer.model.model.norm
                handle = norm.register_forward_hook(
                    lambda *_, stack=stack: stack.enter_context(without_reads()) and None
                )
                stack.callback(handle.remove)
            compute_loss(trainer.model, inputs, num_items_in_batch=count).backward()


@needs_cuda
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash attention is not installed")
def test_flash_attention_packs_and_computes_the_same(cache: Cache, tmp_path: Path) -> None:
    plain = llama(seed=1)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(plain.config), attn_implementation="flash_attention_2")
    model.load_state_dict(plain.state_dict())
    trainer = trainer_of(tmp_path / "flash", cache, model, **STEPS, bf16=True)
    assert trainer.data_collator.one_row
    trainer.train()
    expected = trained(tmp_path / "plain", cache)
    assert trainer.losses == pytest.approx(expected.losses, rel=2e-2)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, DEVICE)
    inputs = trainer._prepare_inputs(batches[0])
    with without_reads(), trainer.compute_loss_context_manager():
        super(type(trainer), trainer).compute_loss(trainer.model, inputs, num_items_in_batch=count).backward()
