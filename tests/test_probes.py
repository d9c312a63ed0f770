"""Probes of a student use the dtype and the attention of the run, on every rank, and log their reasons."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import flash
from support.flash import longest_seen, with_flash
from support.tiny_models import cohere, gemma2, gpt2, granite, llama, mamba
from support.tiny_runs import trainer_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import todi_offline.training.probes
from benchmarks._zoo import tiny_model
from todi_offline.cache.reader import Cache
from todi_offline.training.probes import choose_collator, packing_difference, probe, uses_flash
from todi_offline.training.stream import Collator

Build = Callable[..., Any]
SINGLE_ROW = Collator(one_row=True, bounds=True)


@pytest.fixture(autouse=True)
def calls() -> list[Any]:
    longest_seen.clear()
    return longest_seen


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere])
def test_attention_keeps_packed_sequences_apart(build: Build) -> None:
    model = build().train()
    assert choose_collator(model, flash=False) == Collator()
    assert model.training


def test_a_recurrent_state_does_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_collator(mamba(), flash=False) == Collator(pack=False)
    assert "MambaForCausalLM does not isolate packed sequences (they are off by" in caplog.text


class LeakingLlama(LlamaForCausalLM):
    """Sees its row as one sequence, whatever the positions say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.2])
def test_a_leak_is_noticed_however_small_the_logits_of_a_fresh_model(scale: float) -> None:
    torch.manual_seed(0)
    values = llama().config.to_dict() | {"initializer_range": scale}
    assert packing_difference(LeakingLlama(LlamaConfig.from_dict(values)), Collator()) is not None
    assert packing_difference(llama(initializer_range=scale), Collator()) is None


class CountingLlama(LlamaForCausalLM):
    """Takes no position_ids."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class BoundlessLlama(LlamaForCausalLM):
    """Takes position_ids, and nothing of the bounds."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


class BrokenLlama(LlamaForCausalLM):
    """Has a bug of its own."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise TypeError("unsupported operand type(s)")


def test_a_model_says_which_arguments_it_takes_and_its_other_errors_are_not_swallowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = llama().config
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.bfloat16):
        assert choose_collator(CountingLlama(config), flash=False) == Collator(pack=False, positions=False)
        assert choose_collator(with_flash(BoundlessLlama(llama().config)), flash=True) == Collator(one_row=True)
    assert "CountingLlama takes no position_ids" in caplog.text
    assert "BoundlessLlama takes no cu_seq_lens_q, so each of its layers looks for" in caplog.text
    with pytest.raises(TypeError, match="unsupported operand"):
        choose_collator(BrokenLlama(config), flash=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4_text"])
def test_flash_attention_gets_a_single_row_and_its_bounds(family: str, calls: list[Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_collator(with_flash(tiny_model(family)), flash=True) == SINGLE_ROW
    assert 5 in calls


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "lfm2", "granitemoehybrid", "qwen3_next"])
def test_a_hybrid_whose_state_runs_through_the_row_gets_a_row_for_each_under_flash_attention_too(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "todi_offline"), torch.autocast("cpu", torch.bfloat16):
        assert choose_collator(with_flash(tiny_model(family)), flash=True) == Collator(pack=False)
    assert "does not isolate packed sequences (" in caplog.text


def test_a_float32_student_with_flash_attention_under_bfloat16_is_fused_and_packed(
    cache: Cache, tmp_path: Path, calls: list[Any]
) -> None:
    """Without autocast the kernel refuses float32, which says nothing of the run."""
    model = with_flash(llama(seed=1))
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        model(input_ids=torch.tensor([[1, 2]]))
    trainer = trainer_of(tmp_path, cache, model, bf16=True, max_steps=1)
    assert trainer.head.is_linear
    assert trainer.data_collator == SINGLE_ROW
    calls.clear()
    trainer.train()
    lengths = [len(sequence.token_ids) for sequence in cache]
    assert calls
    assert all(isinstance(longest, int) and longest in lengths for longest in calls)


def test_packed_by_bounds_is_separate(cache: Cache) -> None:
    """The same logits as each sequence by itself."""
    model, members = with_flash(llama().bfloat16()), [cache[index] for index in (3, 0, 6)]
    batch = SINGLE_ROW(members)
    assert batch["bounds"].tolist()[-1] == batch["input_ids"].numel() == sum(len(each.token_ids) for each in members)
    assert batch["longest"] == max(len(each.token_ids) for each in members)
    inputs = todi_offline.training.probes.model_inputs(batch)
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits[0]
        for start, stop in zip(batch["bounds"], batch["bounds"][1:], strict=False):
            alone = model(input_ids=batch["input_ids"][:, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(together[start:stop], alone, rtol=0.05, atol=0.05)


def test_a_model_that_waits_on_the_cpu_for_its_device_is_tried_with_an_attention_that_runs_there(
    calls: list[Any],
) -> None:
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16), device=torch.device("cuda"))
    model = with_flash(llama())
    found = probe(model, accelerator)
    assert (found.head.is_linear, found.collator) == (True, SINGLE_ROW)
    assert not calls
    assert uses_flash(model)
    assert model.config._attn_implementation == flash.NAME


def test_the_first_rank_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may have no weights yet: its own pass would fail."""
    model, accelerator = llama(), Accelerator(cpu=True)
    decided = probe(model, accelerator)

    def given(make: Any, *, together: bool) -> Any:
        assert not together
        return made

    made = todi_offline.training.probes._portable(model, flash=False)
    assert made.head.model is None
    monkeypatch.setattr(todi_offline.training.probes, "of_first_rank", given)
    other = probe(llama().to("meta"), accelerator)
    assert other.head.is_linear == decided.head.is_linear
    assert other.collator == decided.collator
    assert other.head.model is not model
