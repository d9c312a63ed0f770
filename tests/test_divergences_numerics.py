"""Where divergences lead a student, and their numbers at the extremes."""

import math

import numpy as np
import pytest
import torch
from support import reference
from support.divergences import SMOOTH, TEMPERATURES, gradient, probabilities, random_logits
from torch.nn.functional import cross_entropy

from todi_offline.losses import DIVERGENCES, dense_divergence, sparse_divergence
from todi_offline.targets.sparse import SparseTargets, sparsify

# Fixed points


def optimise(loss_of, vocab, rate, steps=300):
    logits = torch.zeros(1, vocab, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        step = gradient(loss_of(logits), logits)
        logits = (logits - rate * step).detach().requires_grad_()
    return probabilities(logits[0])


FIXED_POINT_TEACHER = torch.tensor([[0.3, 0.25, 0.2, 0.1, 0.08, 0.07]], dtype=torch.float64).log()


RATES = {
    "js": 8.0,
    "todi": 1.3,
    "jeffreys": 1.0,
}  # tvd has no gradient that fades; it is zero only at the teacher


@pytest.mark.parametrize("tail", ["none", "bucket", "sampled"])
@pytest.mark.parametrize("divergence", SMOOTH)
def test_a_free_student_ends_at_the_teacher_on_the_kept_ids(divergence, tail):
    uniforms = (torch.arange(50, dtype=torch.float64)[None] + 0.5) / 50
    targets = sparsify(FIXED_POINT_TEACHER, 3, uniforms=uniforms)
    if (divergence, tail) == ("concrete_score", "none"):
        return  # it matches differences of logits alone: any multiple of the teacher's kept probabilities is a solution
    q = optimise(
        lambda logits: sparse_divergence(logits, targets, divergence, tail=tail),
        6,
        RATES.get(divergence, 2.0),
    )
    np.testing.assert_allclose(q[:3], [0.3, 0.25, 0.2], atol=1e-6)
    if tail == "sampled":
        np.testing.assert_allclose(q[3:], [0.1, 0.08, 0.07], atol=1e-6)  # 20, 16 and 14 of the 50 samples


def test_a_student_of_the_renormalised_top_k_ends_elsewhere():
    p = probabilities(FIXED_POINT_TEACHER[0])
    renormalised = torch.from_numpy(p[:3] / p[:3].sum())[None]
    q = optimise(lambda logits: cross_entropy(logits, torch.nn.functional.pad(renormalised, (0, 3))), 6, 1.0)
    np.testing.assert_allclose(q[:3], p[:3] / 0.75, atol=5e-3)  # no longer .3, .25, .2
    assert reference.renormalised_forward_kl(p, q, [0, 1, 2]) < reference.renormalised_forward_kl(p, p, [0, 1, 2])


# Numerics
EXTREMES = {
    "p of 1e-30": ([0.0, -69.0, -69.0, -69.0, -70.0], [0.0, 0.1, 0.2, 0.0, 0.3]),
    "q of 1e-30": ([0.0, 0.1, 0.2, 0.0, 0.3], [0.0, -69.0, -69.0, -69.0, -70.0]),
    "both apart": ([0.0, -69.0, -69.0, -69.0, -70.0], [-69.0, 0.0, -69.0, -69.0, -70.0]),
    "tail of 1e-9": ([0.0, -0.1, -21.0, -22.0, -23.0], [0.0, 0.1, 0.2, 0.0, 0.3]),
    "student's tail of 1e-9": ([0.0, 0.1, -1.0, -1.0, -1.0], [0.0, -0.1, -21.0, -22.0, -23.0]),
    "tail of .999": ([0.01, 0.0, 0.0, 0.0, 0.0], [9.0, 8.0, 0.0, 0.0, 0.0]),
    "equal": ([0.5, 0.1, 0.2, 0.0, -0.3], [0.5, 0.1, 0.2, 0.0, -0.3]),
    "student without a kept id": ([0.0, 0.1, -1.0, -1.0, -1.0], [-math.inf, 0.1, 0.2, 0.0, 0.3]),
    "student without a tail": ([0.0, 0.1, -1.0, -1.0, -1.0], [0.0, 0.1, -math.inf, -math.inf, -math.inf]),
    "student without the kept ids": ([0.0, 0.1, -1.0, -1.0, -1.0], [-math.inf, -math.inf, 0.0, 0.1, 0.2]),
    "teacher without a tail": ([0.0, 0.1, -math.inf, -math.inf, -math.inf], [0.0, 0.1, 0.2, 0.0, 0.3]),
    "teacher of one id": ([0.0, -math.inf, -math.inf, -math.inf, -math.inf], [0.0, 0.1, 0.2, 0.0, 0.3]),
    "neither": ([0.0, 0.1, -math.inf, -math.inf, -math.inf], [0.0, 0.1, -math.inf, -math.inf, -math.inf]),
    "nothing in common": ([0.0, 0.1, -math.inf, -math.inf, -math.inf], [-math.inf, -math.inf, 0.0, 0.1, 0.2]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREMES)
def test_values_and_gradients_are_finite_at_the_extremes(case, dtype):
    teacher, student = (torch.tensor([row], dtype=dtype) for row in EXTREMES[case])
    student.requires_grad_()
    targets = sparsify(teacher, 2, num_tail_samples=4, generator=torch.Generator().manual_seed(0))
    for divergence in DIVERGENCES:
        for temperature in TEMPERATURES:
            options = {"divergence": divergence, "temperature": temperature}
            losses = [dense_divergence(student, teacher, **options)]
            losses += [
                sparse_divergence(student, targets, tail=tail, k=k, **options)
                for tail in ("sampled", "bucket", "none")
                for k in (2, 1)
            ]
            for loss in losses:
                assert loss.isfinite().all(), (options, loss)
                assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert gradient(loss, student).isfinite().all(), options


@pytest.mark.parametrize("tail", ["sampled", "bucket", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_no_loss_in_float32(divergence, tail):
    logits = random_logits(4, 1000, 12, dtype=torch.float32).requires_grad_()
    targets = sparsify(logits, 16, num_tail_samples=4, generator=torch.Generator().manual_seed(0))
    loss = sparse_divergence(logits, targets, divergence, tail=tail)
    assert loss.abs().max() < 2e-6
    if divergence != "tvd" and tail != "sampled":  # the gradient of a sampled tail vanishes in the mean only
        assert gradient(loss, logits).abs().max() < 2e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [151_936, 262_144])
def test_float32_over_a_real_vocabulary_is_near_float64(vocab, temperature):
    student = random_logits(2, vocab, 13, scale=3.0, dtype=torch.bfloat16).requires_grad_()
    teacher = random_logits(2, vocab, 14, scale=3.0, dtype=torch.bfloat16)
    options = {"num_tail_samples": 8, "generator": torch.Generator().manual_seed(0)}
    targets = sparsify(teacher, 64, **options)
    exact = SparseTargets(
        ids=targets.ids,
        logprobs=teacher.double().log_softmax(-1).gather(-1, targets.ids),
        tail_logsumexp=sparsify(teacher.double(), 64).tail_logsumexp,
        temperatures=TEMPERATURES,
        tail_ids=targets.tail_ids,
        tail_logprobs=teacher.double().log_softmax(-1).gather(-1, targets.tail_ids),
    )
    wide = student.detach().double().requires_grad_()
    found = sparse_divergence(student, targets, temperature=temperature)
    expected = sparse_divergence(wide, exact, temperature=temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(found, student).double(), gradient(expected, wide), rtol=2e-2, atol=1e-6)


def test_no_rows_are_no_trouble():
    student = random_logits(0, 9).requires_grad_()
    targets = sparsify(random_logits(0, 9), 3, num_tail_samples=2)
    for divergence in DIVERGENCES:
        for tail in ("sampled", "bucket", "none"):
            loss = sparse_divergence(student, targets, divergence, tail=tail, k=2)
            assert loss.shape == (0,)
            assert gradient(loss, student).shape == (0, 9)
        assert dense_divergence(student, student, divergence).shape == (0,)
