"""Numbers and devices on an accelerator that is none: see `elsewhere`."""

import pytest
import torch
import torch.utils.backend_registration as backends
from torch import Tensor

from todi_offline.losses import DIVERGENCES, DistillationConfig, distillation_loss, fused_linear_distill
from todi_offline.targets import SparseTargets, teacher_targets

if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this release of torch knows no devices made in Python", allow_module_level=True)
from elsewhere import ELSEWHERE, Elsewhere, Elsewheres

NUM_TARGETS, WIDTH, VOCAB, K, NUM_SAMPLES = 6, 8, 600, 5, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NUM_TARGETS)
UNIFORMS = torch.rand(NUM_TARGETS, NUM_SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def teacher(device: torch.device | str) -> tuple[SparseTargets, Tensor]:
    logits = 3 * normal(NUM_TARGETS, VOCAB, seed=1)
    logits[0] = logits[0].round()  # with ties, which a path of its own decides
    return teacher_targets(logits.to(device), LABELS.to(device), K, uniforms=UNIFORMS.to(device))


def here(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, Elsewhere)
    return tensor.inner


def test_the_device_refuses_what_is_not_on_it() -> None:
    with Elsewheres():
        there = torch.ones(3, device=ELSEWHERE)
        assert there.device == ELSEWHERE
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        torch.testing.assert_close(here(there.add_(1)), torch.full((3,), 2.0))


def test_targets_are_taken_where_the_logits_are() -> None:
    expected, expected_labels = teacher("cpu")
    with Elsewheres():
        targets, label_logprobs = teacher(ELSEWHERE)
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
    targets, _ = teacher(device)
    settings = {"num_targets": count, "vocab_size": VOCAB, "chunk_targets": 4}
    loss, sums = fused_linear_distill(hidden, weight, labels, targets, config, bias=bias, **settings)
    gradients = torch.autograd.grad(loss, leaves)
    logits = (hidden @ weight.T + bias).detach()[:, :VOCAB]
    readable, _ = distillation_loss(logits, labels, targets, config, num_targets=count)
    return [loss.detach(), *gradients, *sums.values(), readable]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_and_gradients_are_computed_where_the_student_is(divergence, tail, temperature) -> None:
    config = DistillationConfig(loss=divergence, tail=tail, temperature=temperature)
    with Elsewheres():
        there = [here(tensor) for tensor in losses(ELSEWHERE, config)]
    for found, expected in zip(there, losses("cpu", config), strict=True):
        torch.testing.assert_close(found, expected)
