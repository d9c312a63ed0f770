"""Training with the fused loss inside the forward pass gives the same numbers as training on logits."""

import dataclasses
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from support.tiny_models import VOCAB, cohere, gemma2, gpt2, granite, llama
from support.tiny_runs import CHECKPOINTING, Noting, assert_same_weights, trainer_of
from torch import Tensor, nn
from transformers import TrainerCallback

import todi_offline.training.trainer
from todi_offline.cache.reader import Cache
from todi_offline.losses import DistillationConfig
from todi_offline.models.head import output_module
from todi_offline.student import LoraSettings, add_lora


class Gradients(TrainerCallback):
    """Notes the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, _: Any, __: Any, ___: Any, model: nn.Module, **____: Any) -> None:
        self.steps.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )


def frozen_head() -> Any:
    model = llama(seed=1)
    model.lm_head.requires_grad_(False)
    return model


def frozen_tied_head() -> Any:
    model = llama(seed=1, tie_word_embeddings=True)
    model.lm_head.requires_grad_(False)
    return model


def head_alone() -> Any:
    model = llama(seed=1).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def biased_head() -> Any:
    model = llama(seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.lm_head = nn.Linear(32, VOCAB)
    return model


def adapted() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_lora(llama(seed=1), LoraSettings(lora_r=4))


MODELS = {
    "llama": lambda: llama(seed=1),
    "tied": lambda: llama(seed=1, tie_word_embeddings=True),
    "padded": lambda: llama(seed=1, vocab_size=VOCAB + 64),
    "frozen head": frozen_head,
    "frozen tied head": frozen_tied_head,
    "head alone": head_alone,
    "biased head": biased_head,
    "LoRA": adapted,
    "gpt2": lambda: gpt2(seed=1),
    "scaled, tied": lambda: cohere(seed=1),
    "scaled": lambda: granite(seed=1),
    "capped": lambda: gemma2(seed=1),
}


def run(out: Path, cache: Cache, build: Callable[[], Any], *, readable: bool, **settings: Any) -> tuple[Noting, Any]:
    noted = Gradients()
    values = {"max_steps": 3, "gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = trainer_of(out, cache, build(), callbacks=[noted], **(values | settings))
    assert trainer.head.is_linear
    if readable:
        trainer.head = dataclasses.replace(trainer.head, is_linear=False)
    trainer.train()
    return trainer, noted.steps


def assert_same_runs(
    out: Path, cache: Cache, build: Callable[[], Any], precision: float = 1e-5, **settings: Any
) -> None:
    fused, gradients = run(out / "fused", cache, build, readable=False, **settings)
    readable, expected = run(out / "readable", cache, build, readable=True, **settings)
    assert fused.losses == pytest.approx(readable.losses, rel=precision)
    assert len(gradients) == len(expected) == 3
    assert all(gradient.any() for gradient in gradients[-1].values())
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).abs().max() <= precision * gradient.abs().max(), name
    for mine, theirs in zip(fused.state.log_history[:3], readable.state.log_history[:3], strict=True):
        for name in ("kd", "cross_entropy", "forward_kl", "share_a_above_half", "student_kept_mass"):
            assert mine[name] == pytest.approx(theirs[name], rel=max(precision, 1e-4)), name


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_equal_those_of_the_logits(model: str, cache: Cache, tmp_path: Path) -> None:
    config = DistillationConfig(temperature=2.0, kd_weight=0.7) if model in ("llama", "scaled", "capped") else None
    assert_same_runs(tmp_path, cache, MODELS[model], distillation=config)


def assert_same_when_compiled(out: Path, cache: Cache) -> None:
    compiled, gradients = run(out / "compiled", cache, MODELS["llama"], readable=False, torch_compile=True)
    plain, expected = run(out / "plain", cache, MODELS["llama"], readable=False)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        for (_, found), (_, wanted) in zip(sorted(mine.items()), sorted(theirs.items()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_so_they_are_where_the_model_is_compiled(cache: Cache, tmp_path: Path) -> None:
    code = (  # in a process of its own, without the checks of shapes: torch.compile cannot trace these
        "import sys; from pathlib import Path; from test_trainer_fused import assert_same_when_compiled;"
        "from todi_offline import open_cache; assert_same_when_compiled(Path(sys.argv[1]), open_cache(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(cache.root)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("model", ["llama", "tied", "LoRA"])
def test_so_they_are_with_gradient_checkpointing(model: str, cache: Cache, tmp_path: Path) -> None:
    assert_same_runs(tmp_path, cache, MODELS[model], **{CHECKPOINTING: True})


@pytest.mark.parametrize("model", ["llama", "tied", "biased head", "capped"])
def test_in_bfloat16_they_are_as_near_as_that_is(model: str, cache: Cache, tmp_path: Path) -> None:
    assert_same_runs(tmp_path, cache, MODELS[model], precision=2e-2, bf16=True, learning_rate=1e-3)


def test_an_evaluation_gives_the_same_metrics(cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache, eval_dataset=heldout)
    fused = trainer.evaluate()
    assert trainer.head.is_linear
    trainer.head = dataclasses.replace(trainer.head, is_linear=False)
    readable = trainer.evaluate()
    for name in ("loss", "kd", "cross_entropy", "reverse_kl", "tail_share"):
        assert fused[f"eval_{name}"] == pytest.approx(readable[f"eval_{name}"], rel=1e-5), name


def test_the_model_is_left_as_it_was(cache: Cache, tmp_path: Path) -> None:
    model = llama(seed=1)
    attributes = set(vars(model.lm_head))
    trainer = trainer_of(tmp_path, cache, model, max_steps=1, learning_rate=0.0)
    trainer.train()
    assert set(vars(trainer.model.lm_head)) == attributes
    assert not trainer.model.lm_head._forward_hooks
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        found = trainer.model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(found, llama(seed=1)(input_ids=tokens).logits)


def test_the_objective_reads_only_the_targets_and_no_logits_are_returned(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, cache, max_steps=2)
    rows: list[int] = []
    fused = todi_offline.training.trainer.fused_linear_distill

    def watched(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden))
        return fused(hidden, *args, **kwargs)

    monkeypatch.setattr(todi_offline.training.trainer, "fused_linear_distill", watched)
    returned: list[Any] = []
    trainer.model.register_forward_hook(lambda _, __, output: returned.append(output))
    trainer.train()
    assert rows == [len(batch["labels"]) for batch in trainer.batches]
    assert [set(output) for output in returned] == [{"loss"}] * 2


def test_requested_outputs_have_logits_and_the_same_loss(cache: Cache, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cache)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        loss, outputs = todi_offline.training.trainer.ToDiTrainer.compute_loss(
            trainer, trainer.model, batch, return_outputs=True
        )
        alone = trainer.compute_loss(trainer.model, batch)
    assert outputs.logits.shape == (1, len(batch["labels"]), VOCAB)
    torch.testing.assert_close(loss, alone)


class Offset(nn.Linear):
    """A head that is not what its class says, as those of quantised models are not."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 1


def hooked() -> Any:
    model = llama(seed=1)
    model.lm_head.register_forward_hook(lambda _, __, output: 2 * output)
    return model


def offset() -> Any:
    model = llama(seed=1)
    model.lm_head = Offset(32, VOCAB, bias=False)
    return model


def adapted_head() -> Any:
    return add_lora(llama(seed=1), LoraSettings(lora_r=4, lora_target_modules=("lm_head",)))


@pytest.mark.parametrize("build", [hooked, offset, adapted_head])
def test_a_head_that_is_more_than_a_linear_layer_runs_itself_and_a_line_says_so(
    build: Callable[[], Any], cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="todi_offline"):
        trainer = trainer_of(tmp_path, cache, build(), max_steps=2, report_to="none")
        rows: list[int] = []
        output_module(trainer.model).register_forward_hook(lambda _, __, output: rows.append(output.numel() // VOCAB))
        trainer.train()
    assert not trainer.head.is_linear
    assert rows == [len(batch["labels"]) for batch in trainer.batches]
    assert caplog.text.count("is not a plain linear layer") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile has warnings about what it traces
def test_a_compiled_model_trains_alike(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    plain, _ = run(tmp_path / "a", cache, MODELS["tied"], readable=False)
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled, _ = run(tmp_path / "b", cache, MODELS["tied"], readable=False, **settings)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert_same_weights(compiled.model, plain.model, 1e-5)
