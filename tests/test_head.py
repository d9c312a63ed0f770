"""The head of a model: what it computes, where it runs and how it is chunked, always with the model's logits."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, cohere, gemma2, gpt2, granite, llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._zoo import tiny_model
from todi_offline.errors import ModelError
from todi_offline.models.head import head_of, logits_difference, output_module, require_vocabulary, tried_head

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
    head = tried_head(model)
    assert head.runs_apart
    with torch.no_grad():
        chunks = list(head.chunks(POSITIONS, 2, input_ids=TOKENS))
    assert list(map(len, chunks)) == [2, 2, 1]
    torch.testing.assert_close(torch.cat(chunks), full_logits(model)[POSITIONS], rtol=1e-5, atol=1e-5)


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
    assert not tried_head(model).runs_apart
    assert re.search(r"in an unknown way \(they are off by \d+\.\d% of the largest\)", caplog.text)


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
        head = tried_head(model)
    assert "OffsetLlama changes its logits in an unknown way" in caplog.text
    with torch.no_grad(), head.at(POSITIONS):
        logits = model(input_ids=TOKENS).logits[0]
    assert logits.shape == (len(POSITIONS), VOCAB)
    torch.testing.assert_close(logits, full_logits(model)[POSITIONS], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(head.chunks(POSITIONS, 2, input_ids=TOKENS))), logits)


def test_a_head_at_positions_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = llama()
    with pytest.raises(RuntimeError, match="stop"), head_of(model).at(POSITIONS):
        raise RuntimeError("stop")
    assert full_logits(model).shape == (TOKENS.numel(), VOCAB)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, granite, cohere])
def test_a_loss_in_the_forward_pass_is_returned_unchanged_with_its_gradients(build: Build) -> None:
    """Not scaled, not capped: those are far from the identity here."""
    model = build()
    head = tried_head(model, linear=True)
    assert head.is_linear
    expected_of = head.hidden_states(POSITIONS, input_ids=TOKENS)

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        torch.testing.assert_close(hidden, expected_of)
        return 100 * (hidden @ weight.T).square().mean()

    with head.loss_at(POSITIONS, loss_of):
        found = model(input_ids=TOKENS)
    assert set(found) == {"loss"}
    expected = loss_of(expected_of, head.module.weight, None)
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

    with pytest.raises(RuntimeError, match="stop"), head_of(model).loss_at(POSITIONS, loss_of):
        model(input_ids=TOKENS)
    torch.testing.assert_close(full_logits(model), expected)


class Quantised(Tensor):
    """Stands for the tensors of quantised weights, which multiply in ways of their own."""


def test_a_head_that_is_no_plain_linear_layer_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    def of_another_kind(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))

    def patched(model: Any) -> None:
        model.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(model.lm_head, hidden)

    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("its weight is a Quantised", of_another_kind),
        ("its forward is replaced", patched),
        ("it has hooks", lambda model: model.lm_head.register_forward_hook(lambda *_: None)),
        ("it has hooks", lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None)),
        ("it has hooks", lambda model: model.lm_head.register_full_backward_hook(lambda *_: None)),
        ("its weight is a Tensor", lambda model: nn.utils.parametrizations.weight_norm(model.lm_head)),
        ("a Sequential", lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head))),
    ]
    for reason, change in changes:
        model = llama()
        change(model)
        caplog.clear()
        assert not tried_head(model, linear=True).is_linear
        assert f"the head of LlamaForCausalLM is not a plain linear layer ({reason})" in caplog.text


def test_a_model_that_drops_out_is_compared_without(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert tried_head(model, linear=True).is_linear
    assert model.training


def test_a_student_that_lacks_ids_of_the_cache_is_refused() -> None:
    require_vocabulary(llama(), VOCAB)
    require_vocabulary(llama(vocab_size=VOCAB + 64), VOCAB)
    with pytest.raises(ModelError, match=r"head has 500 ids, but the cache's targets are over 512"):
        require_vocabulary(llama(vocab_size=500), VOCAB)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no output embeddings"):
        output_module(llama().model)


def test_errors_of_the_forward_pass_are_not_swallowed() -> None:
    model = llama()
    model.model.layers[0].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="of the kernel"):
        tried_head(model)


def _fail(*_: Any) -> None:
    raise RuntimeError("a bug of the kernel")


def test_under_autocast_rounding_is_taken_for_rounding() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        assert tried_head(model, linear=True).is_linear
    logits = full_logits(model)
    assert logits_difference(logits.bfloat16(), logits) is None
    assert logits_difference(logits + logits.abs().max() / 100, logits) == "they are off by 1.0% of the largest"
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_difference(logits + logits.abs().max() / 100, logits) is None
    assert logits_difference(logits[1:], logits) == "their shape is (40, 512), expected (39, 512)"
    assert logits_difference(logits * torch.nan, logits) == "they are off by nan% of the largest"


def test_a_model_that_does_not_run_its_head_is_named() -> None:
    model = llama()
    model.get_output_embeddings = lambda: nn.Linear(32, VOCAB)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not run its output embeddings"):
        head_of(model).hidden_states(POSITIONS, input_ids=TOKENS)
