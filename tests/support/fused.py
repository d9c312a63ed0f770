"""A small head with its inputs, and the fused loss beside the readable one."""

import dataclasses

import torch

from todi_offline.losses import DistillationConfig, distillation_loss, fused_linear_distill
from todi_offline.targets.sparse import sparsify

NUM_TARGETS, WIDTH, VOCAB, K = 7, 4, 19, 5
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


def case(num_targets=NUM_TARGETS, width=WIDTH, vocab=VOCAB, dtype=torch.float64, num_tail_samples=3, seed=0):
    """Return hidden states, a head's weight and bias, all of which require gradients, labels and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (
        x.to(dtype).requires_grad_() for x in (normal(num_targets, width), normal(vocab, width), normal(vocab))
    )
    labels = torch.randint(vocab, (num_targets,), generator=generator)
    teacher = (2 * normal(num_targets, vocab)).to(torch.promote_types(dtype, torch.float32))
    return hidden, weight, bias, labels, sparsify(teacher, K, num_tail_samples=num_tail_samples, generator=generator)


def readable(
    hidden, weight, bias, labels, targets, *, vocab_size=None, scale=1.0, softcap=None, num_targets=None, **settings
):
    logits = hidden @ weight[:vocab_size].T
    if bias is not None:
        logits = logits + bias[:vocab_size]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return distillation_loss(logits, labels, targets, DistillationConfig(**settings), num_targets=num_targets)


def fused(hidden, weight, bias, labels, targets, **options):
    names = [field.name for field in dataclasses.fields(DistillationConfig)]
    config = DistillationConfig(**{name: options.pop(name) for name in names if name in options})
    return fused_linear_distill(hidden, weight, labels, targets, config, bias=bias, **options)


def assert_equal(inputs, chunk_targets=3, **options):
    """Compare loss, sums and gradients of the fused and the readable form."""
    given = [x for x in inputs[:3] if x is not None and x.requires_grad]
    loss, sums = fused(*inputs, chunk_targets=chunk_targets, **options)
    expected, expected_sums = readable(*inputs, **options)
    precision = PRECISION[inputs[0].dtype]
    torch.testing.assert_close(loss, expected, rtol=precision, atol=0)
    assert sums.keys() == expected_sums.keys()
    for name, value in expected_sums.items():
        torch.testing.assert_close(sums[name], value, rtol=precision, atol=precision)
        assert not sums[name].requires_grad
    # By something else than one, so that backward has to multiply.
    gradients = torch.autograd.grad(3 * loss, given)
    for found, wanted in zip(gradients, torch.autograd.grad(3 * expected, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=precision, atol=precision * wanted.abs().max().item())
