"""Loading, the vocabulary that means something, and where a model's head runs."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, cohere, gemma2, gpt2, granite, llama, save, save_llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._zoo import tiny_model
from todi_offline.errors import ModelError
from todi_offline.models import (
    chunked_head,
    evaluation_mode,
    head_at,
    linear_head,
    load_model,
    load_tokenizer,
    loss_at,
    output_head,
    real_vocab_size,
    resolve_device,
    resolve_dtype,
)

TOKENS = torch.arange(3, 43).view(2, 20)
POSITIONS = torch.tensor([0, 7, 19, 20, 33])

Build = Callable[..., Any]


def full_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1)


def recurrent_gemma() -> Any:
    return tiny_model("recurrent_gemma", logits_soft_cap=2.0)


def xlstm() -> Any:
    return tiny_model("xlstm", output_logit_soft_cap=2.0)


class OffsetLlama(LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True) + output.logits[..., :1]
        return output


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere, recurrent_gemma, xlstm])
def test_a_chunked_head_gives_the_models_own_logits(build: Build) -> None:
    model = build()
    head = chunked_head(model)
    assert head is not None
    with torch.no_grad():
        hidden = head.hidden_states(POSITIONS, input_ids=TOKENS)
        logits = torch.cat([head.logits(hidden[:2]), head.logits(hidden[2:])])
    torch.testing.assert_close(logits, full_logits(model)[POSITIONS], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "name", "other"),
    [(gemma2, "final_logit_softcapping", 4.0), (granite, "logits_scaling", 3.1), (cohere, "logit_scale", 0.26)],
)
def test_a_head_that_does_something_else_than_its_config_says_is_noticed(
    build: Build, name: str, other: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    own, changed = model.config, model.config.to_dict() | {name: other}
    model.forward = _with_config(model, own)
    model.config = type(own).from_dict(changed)
    assert chunked_head(model) is None
    assert "unknown here" in caplog.text


def _with_config(model: Any, config: Any) -> Callable[..., Any]:
    """The forward pass of a model as if its config were still that one."""
    forward = type(model).forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        now, model.config = model.config, config
        try:
            kwargs.pop("use_cache", None)
            return forward(model, *args, **kwargs, use_cache=False)
        finally:
            model.config = now

    return patched


def test_an_unknown_head_falls_back_with_a_warning_and_runs_only_at_the_targets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = OffsetLlama(LlamaConfig.from_dict(llama().config.to_dict())).eval()
    with caplog.at_level(logging.WARNING):
        assert chunked_head(model) is None
    assert "OffsetLlama does something to its logits that is unknown here" in caplog.text
    with torch.no_grad(), head_at(model, POSITIONS):
        logits = model(input_ids=TOKENS).logits[0]
    assert logits.shape == (len(POSITIONS), VOCAB)
    torch.testing.assert_close(logits, full_logits(model)[POSITIONS], rtol=1e-5, atol=1e-5)


def test_head_at_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = llama()
    with pytest.raises(RuntimeError, match="stop"), head_at(model, POSITIONS):
        raise RuntimeError("stop")
    assert full_logits(model).shape == (TOKENS.numel(), VOCAB)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere])
def test_a_loss_in_the_forward_pass_is_returned_as_it_is_with_its_gradients(build: Build) -> None:
    """Not scaled, not capped: those are far from the identity here."""
    model = build()
    assert linear_head(model) is not None
    head = chunked_head(model)
    expected_of = head.hidden_states(POSITIONS, input_ids=TOKENS)

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        torch.testing.assert_close(hidden, expected_of)
        return 100 * (hidden @ weight.T).square().mean()

    with loss_at(model, POSITIONS, loss_of):
        found = model(input_ids=TOKENS)
    assert set(found) == {"loss"}
    expected = loss_of(expected_of, output_head(model).weight, None)
    assert found["loss"].shape == ()
    torch.testing.assert_close(found["loss"], expected)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (found["loss"], expected))
    torch.testing.assert_close(*gradients)
    assert full_logits(model).shape == (TOKENS.numel(), VOCAB)


def test_an_error_in_the_loss_leaves_the_model_as_it_was() -> None:
    model, expected = llama(), full_logits(llama())

    def loss_of(*_: Any) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), loss_at(model, POSITIONS, loss_of):
        model(input_ids=TOKENS)
    torch.testing.assert_close(full_logits(model), expected)


class Quantised(Tensor):
    """Stands for the tensors of quantised weights, which multiply in ways of their own."""


def test_a_head_that_is_no_plain_linear_layer_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    def of_another_kind(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))

    def patched(model: Any) -> None:
        model.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(model.lm_head, hidden)

    changes: list[Callable[[Any], Any]] = [
        of_another_kind,
        patched,
        lambda model: model.lm_head.register_forward_hook(lambda *_: None),
        lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
        lambda model: model.lm_head.register_full_backward_hook(lambda *_: None),
        lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
        lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)),
    ]
    for change in changes:
        model = llama()
        change(model)
        caplog.clear()
        assert linear_head(model) is None
        assert "the head of LlamaForCausalLM is no plain linear layer" in caplog.text


def test_a_model_that_drops_out_is_compared_without(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert linear_head(model) is not None
    assert model.training


def test_ids_beyond_the_tokenizers_are_padding_of_the_embedding() -> None:
    assert real_vocab_size(tiny_tokenizer(), llama(vocab_size=VOCAB + 64)) == VOCAB


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match=rf"knows {VOCAB} ids and the model's head only 500"):
        real_vocab_size(tiny_tokenizer(), llama(vocab_size=500))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no output embeddings"):
        output_head(llama().model)


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model = llama()
    loaded = load_model(str(save(model, tmp_path)), device="cpu")
    torch.testing.assert_close(full_logits(loaded), full_logits(model), rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()
    assert load_model(str(tmp_path), dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=r"model has no tokenizer that can be loaded .*save the teacher's tokenizer"):
        load_tokenizer(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty cannot be loaded as a causal language model"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"there is no folder .*nothing; name a folder with a model"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"there is no file .*missing\.gguf"):
        load_model(str(tmp_path / "missing.gguf"))


def test_devices_and_dtypes_go_by_their_names() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("auto") == "auto"
    with pytest.raises(ModelError, match="device 'gpu' is unknown"):
        resolve_device("gpu")
    for name in ("float31", "int64", "nn"):
        with pytest.raises(ModelError, match=f"dtype '{name}' is unknown"):
            resolve_dtype(name)


def test_evaluation_mode_is_left_as_it_was_found() -> None:
    model = llama().train()
    with evaluation_mode(model):
        assert not model.training
        assert not full_logits(model).requires_grad
    assert model.training
