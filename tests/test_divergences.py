"""Divergences, dense and sparse, compared with the float64 formulas in `support/reference.py`."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch.nn.functional import cross_entropy

from todi_offline.errors import ConfigError, TargetsError
from todi_offline.losses import DIVERGENCES, DistillationConfig, dense_divergence, distillation_loss, sparse_divergence
from todi_offline.losses.divergences import (
    alpha_mixture,
    entropy_gate,
    installed_divergence,
    near_teacher,
    resolve,
    skew_forward_kl,
    todi,
)
from todi_offline.losses.entries import entry_divergence, student_entries, teacher_entries
from todi_offline.targets.sparse import SparseTargets, sparsify

seeded = settings(derandomize=True, deadline=None, max_examples=40)
OTHERS = ("adaptive_kl", "alpha_beta", "alpha_mixture", "concrete_score", "entropy_gate")
F_DIVERGENCES = [name for name in DIVERGENCES if name not in OTHERS]  # and ToDi, alike here
SMOOTH = [name for name in DIVERGENCES if name != "tvd"]
TEMPERATURES = (1.0, 2.0)

GOLDEN_TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
GOLDEN_STUDENT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()


def random_logits(num_targets, vocab, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_targets, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


def probabilities(logits, temperature=1.0):
    return np.exp(reference.log_softmax(logits.detach().numpy(), temperature))


def every_draw(targets, logits):
    """Return one row for each id that could be drawn from the tail of a single row, and its probability."""
    kept, logprobs = targets.ids[0].tolist(), reference.log_softmax(logits[0].numpy())
    chance = reference.conditional_tail(logprobs, kept, targets.tail_temperature)
    drawn = torch.tensor(list(chance))[:, None]
    rows = torch.zeros(len(drawn), dtype=torch.int64)
    enumerated = SparseTargets(
        ids=targets.ids[rows],
        logprobs=targets.logprobs[rows],
        tail_logsumexp=targets.tail_logsumexp[rows],
        temperatures=targets.temperatures,
        tail_ids=drawn,
        tail_logprobs=torch.from_numpy(logprobs)[drawn],
        tail_temperature=targets.tail_temperature,
    )
    return enumerated, torch.tensor(list(chance.values()), dtype=torch.float64)


# Values


@pytest.mark.parametrize(
    ("divergence", "beta", "expected"),
    [
        ("todi", 0.0, 0.088577838096),
        ("todi", 1.0, 0.177155676191),
        ("todi", 2.0, 0.255423792449),
        ("forward_kl", 1.0, 0.085122825957),
        ("reverse_kl", 1.0, 0.092032850234),
        ("jeffreys", 1.0, 0.177155676191),
        ("js", 1.0, 0.021901178968),
        ("tvd", 1.0, 0.2),
        ("skew_forward_kl", 1.0, 0.069577966524),
        ("skew_reverse_kl", 1.0, 0.072827533459),
        ("alpha_beta", 1.0, 0.102590650444),
        ("alpha_mixture", 1.0, 0.069086638659),
        ("concrete_score", 1.0, 0.096773963219),
        ("entropy_gate", 1.0, 0.092032850234),  # an entropy of 0.80 nats
        ("adaptive_kl", 1.0, 0.088577838096),  # head gap .2 of .4: half of each KL
    ],
)
def test_golden_values(divergence, beta, expected):
    assert dense_divergence(GOLDEN_STUDENT, GOLDEN_TEACHER, divergence, beta=beta).item() == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_dense_divergence_equals_the_reference(divergence, temperature):
    student, teacher = random_logits(5, 9, 1), random_logits(5, 9, 2)
    found = dense_divergence(student, teacher, divergence, temperature=temperature)
    expected = [
        reference.DIVERGENCES[divergence](probabilities(t, temperature), probabilities(s, temperature))
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("tail", ["bucket", "none"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_sparse_divergence_equals_the_reference(divergence, temperature, tail):
    student, teacher = random_logits(5, 12, 1), random_logits(5, 12, 2)
    found = sparse_divergence(student, sparsify(teacher, 5), divergence, temperature=temperature, k=4, tail=tail)
    for row in range(5):
        p, q = probabilities(teacher[row], temperature), probabilities(student[row], temperature)
        kept = reference.top_k(np.log(p), 4)
        p, q = (v[kept] if tail == "none" else reference.with_bucket(v, kept) for v in (p, q))
        assert found[row].item() == pytest.approx(reference.DIVERGENCES[divergence](p, q), rel=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_the_whole_vocabulary_kept_the_bucket_is_dense(divergence, temperature):
    student, teacher = random_logits(4, 9, 1).requires_grad_(), random_logits(4, 9, 2)
    dense = dense_divergence(student, teacher, divergence, temperature=temperature)
    for tail in ("bucket", "auto", "none"):
        sparse = sparse_divergence(student, sparsify(teacher, 9), divergence, temperature=temperature, tail=tail)
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient(sparse, student), gradient(dense, student))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_the_bucket_is_dense_where_the_tail_has_the_shape_of_the_students(divergence, temperature):
    student = random_logits(4, 12, 1, scale=1.0).requires_grad_()
    teacher = student.detach().clone() - 1.5
    teacher[:, :4] = random_logits(4, 4, 2) + 8
    targets = sparsify(teacher, 4)
    assert (targets.ids < 4).all()
    dense = dense_divergence(student, teacher, divergence, temperature=temperature)
    sparse = sparse_divergence(student, targets, divergence, temperature=temperature)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(sparse, student), gradient(dense, student), rtol=1e-8, atol=1e-10)


@seeded
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), divergence=st.sampled_from(F_DIVERGENCES))
def test_the_bucket_is_never_more_than_dense_and_never_negative(seed, k, divergence):
    student, teacher = random_logits(3, 12, seed), random_logits(3, 12, seed + 1)
    dense = dense_divergence(student, teacher, divergence)
    sparse = sparse_divergence(student, sparsify(teacher, k), divergence)
    assert (sparse <= dense + 1e-12).all()
    assert (sparse >= -1e-12).all()


@seeded
@given(
    seed=st.integers(0, 10_000),
    divergence=st.sampled_from(list(DIVERGENCES)),
    tail=st.sampled_from(["bucket", "none"]),
)
def test_every_divergence_is_zero_at_the_teacher_and_not_negative_elsewhere(seed, divergence, tail):
    student, teacher = random_logits(3, 12, seed), random_logits(3, 12, seed + 1)
    targets = sparsify(teacher, 4)
    assert (sparse_divergence(student, targets, divergence, tail=tail) >= -1e-12).all()
    same = teacher.clone().requires_grad_()
    loss = sparse_divergence(same, targets, divergence, tail=tail)
    torch.testing.assert_close(loss.detach(), torch.zeros(3, dtype=torch.float64), atol=1e-13, rtol=0)
    if divergence != "tvd":
        assert gradient(loss, same).abs().max() < 1e-13


# Gradients


@pytest.mark.parametrize("tail", ["dense", "bucket", "none"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_equal_finite_differences_with_stopped_gradients_fixed(divergence, temperature, tail):
    student, teacher = random_logits(1, 8, 3).requires_grad_(), random_logits(1, 8, 4)
    if tail == "dense":
        loss = dense_divergence(student, teacher, divergence, temperature=temperature)
    else:
        loss = sparse_divergence(student, sparsify(teacher, 3), divergence, temperature=temperature, tail=tail)
    kept = reference.top_k(teacher[0].numpy(), 8 if tail == "dense" else 3)

    def entries(logits):
        values = np.exp(reference.log_softmax(logits, temperature))
        return reference.with_bucket(values, kept) if tail == "bucket" else values[kept]

    fixed = {"gate_q": entries(student.detach().numpy()[0])} if divergence in reference.STOPS_GRADIENT else {}
    p = entries(teacher.numpy()[0])
    expected = reference.finite_difference(
        lambda logits: reference.DIVERGENCES[divergence](p, entries(logits), **fixed),
        student.detach().numpy()[0],
    )
    np.testing.assert_allclose(gradient(loss, student)[0], expected, atol=1e-8)


@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_of_todi_is_its_closed_form(temperature, beta):
    student, teacher = random_logits(3, 10, 5).requires_grad_(), random_logits(3, 10, 6)
    dense = gradient(dense_divergence(student, teacher, beta=beta, temperature=temperature), student)
    sparse = gradient(sparse_divergence(student, sparsify(teacher, 4), beta=beta, temperature=temperature), student)
    for row in range(3):
        p, q = probabilities(teacher[row], temperature), probabilities(student[row], temperature)
        kept = reference.top_k(np.log(p), 4)
        np.testing.assert_allclose(dense[row], reference.todi_gradient(p, q, beta, temperature), atol=1e-12)
        expected = reference.todi_bucket_gradient(p, q, kept, beta, temperature)
        np.testing.assert_allclose(sparse[row], expected, atol=1e-12)


def test_todi_is_detached_where_the_value_cannot_tell():
    student = GOLDEN_STUDENT.clone().requires_grad_()
    found = gradient(dense_divergence(student, GOLDEN_TEACHER), student)[0]
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    attached = reference.todi_gradient(p, q, 1.0, 1.0, detached=False)
    np.testing.assert_allclose(found, [-0.31775086, 0.14439223, 0.17335863], atol=1e-8)
    np.testing.assert_allclose(attached, [-0.41425254, 0.19402968, 0.22022287], atol=1e-8)


def test_todi_at_beta_one_has_the_value_of_jeffreys_and_another_gradient():
    student, teacher = random_logits(3, 10, 5).requires_grad_(), random_logits(3, 10, 6)
    for targets in (None, sparsify(teacher, 4)):
        losses = [
            dense_divergence(student, teacher, name) if targets is None else sparse_divergence(student, targets, name)
            for name in ("todi", "jeffreys")
        ]
        torch.testing.assert_close(*losses)
        first, second = (gradient(loss, student) for loss in losses)
        assert (first - second).abs().max() > 1e-2


def test_todi_at_beta_zero_is_half_of_jeffreys_in_value_and_gradient():
    student, teacher = random_logits(3, 10, 5).requires_grad_(), random_logits(3, 10, 6)
    half, whole = dense_divergence(student, teacher, beta=0.0), dense_divergence(student, teacher, "jeffreys")
    torch.testing.assert_close(half, whole / 2)
    torch.testing.assert_close(gradient(half, student), gradient(whole, student) / 2)


def test_todi_at_beta_minus_one_has_no_value_but_a_gradient():
    student, teacher = random_logits(3, 10, 5).requires_grad_(), random_logits(3, 10, 6)
    loss = dense_divergence(student, teacher, beta=-1.0)
    torch.testing.assert_close(loss.detach(), torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    assert gradient(loss, student).abs().max() > 1e-2


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("divergence", [name for name in SMOOTH if name != "alpha_beta"])
def test_the_weight_of_the_sampled_tail_is_the_value_over_forward_kl_near_the_teacher(divergence, beta):
    teacher = random_logits(1, 6, 7, scale=0.5)
    student = teacher + 1e-4 * random_logits(1, 6, 8)
    near = dense_divergence(student, teacher, divergence, beta=beta).item()
    forward = dense_divergence(student, teacher, "forward_kl").item()

    targets = sparsify(teacher, 2, num_tail_samples=1, generator=torch.Generator().manual_seed(0))
    far = random_logits(1, 6, 9)
    bucket = sparse_divergence(far, targets, divergence, beta=beta, tail="bucket")
    with_tail, with_one = (
        sparse_divergence(far, targets, divergence, beta=beta, tail_weight=weight) for weight in (None, 1.0)
    )
    assert ((with_tail - bucket) / (with_one - bucket)).item() == pytest.approx(near / forward, rel=1e-3)


# The sampled tail


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("tail_temperature", TEMPERATURES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("divergence", ["todi", "forward_kl", "js"])
def test_the_sampled_tail_has_no_bias(divergence, temperature, tail_temperature, k):
    student, teacher = random_logits(1, 11, 10), random_logits(1, 11, 11)
    targets = sparsify(teacher, 4, (1.0, 2.0, 0.5), num_tail_samples=1, tail_temperature=tail_temperature)
    enumerated, chance = every_draw(targets, teacher)
    of_each_draw = sparse_divergence(
        student.expand(len(chance), -1), enumerated, divergence, temperature=temperature, k=k, tail_weight=0.7
    )
    p, q = probabilities(teacher[0], temperature), probabilities(student[0], temperature)
    kept = reference.top_k(np.log(p), k)
    bucket = reference.DIVERGENCES[divergence](reference.with_bucket(p, kept), reference.with_bucket(q, kept))
    expected = bucket + 0.7 * reference.tail_forward_kl(p, q, kept)
    assert (chance * of_each_draw).sum().item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_with_a_sampled_tail_is_dense_in_expectation_with_its_gradient(temperature, k):
    student, teacher = random_logits(1, 11, 10).requires_grad_(), random_logits(1, 11, 11)
    enumerated, chance = every_draw(sparsify(teacher, 4, num_tail_samples=1), teacher)
    of_each_draw = sparse_divergence(
        student.expand(len(chance), -1), enumerated, "forward_kl", temperature=temperature, k=k
    )
    dense = dense_divergence(student, teacher, "forward_kl", temperature=temperature)
    expectation = (chance * of_each_draw).sum()
    assert expectation.item() == pytest.approx(dense.item(), rel=1e-10)
    torch.testing.assert_close(gradient(expectation, student), gradient(dense, student), atol=1e-12, rtol=1e-9)


def test_several_samples_are_averaged():
    student, teacher = random_logits(1, 11, 10), random_logits(1, 11, 11)
    enumerated, _ = every_draw(sparsify(teacher, 4, num_tail_samples=1), teacher)
    apart = sparse_divergence(student.expand(7, -1), enumerated)
    together = SparseTargets(
        enumerated.ids[:1],
        enumerated.logprobs[:1],
        enumerated.tail_logsumexp[:1],
        enumerated.temperatures,
        enumerated.tail_ids.T,
        enumerated.tail_logprobs.T,
    )
    assert sparse_divergence(student, together).item() == pytest.approx(apart.mean().item())


def test_auto_takes_samples_where_there_are_some():
    student, teacher = random_logits(2, 11, 10), random_logits(2, 11, 11)
    sampled, plain = sparsify(teacher, 4, num_tail_samples=3), sparsify(teacher, 4)
    for targets, tail in ((sampled, "sampled"), (plain, "bucket")):
        found, expected = (sparse_divergence(student, targets, tail=t) for t in ("auto", tail))
        assert found.equal(expected)
    assert not sparse_divergence(student, sampled, tail="bucket").equal(sparse_divergence(student, sampled))


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


# What is passed


def test_a_smaller_k_equals_narrowed_targets():
    student, teacher = random_logits(4, 12, 1), random_logits(4, 12, 2)
    targets = sparsify(teacher, 6)
    for tail in ("bucket", "none"):
        for temperature in TEMPERATURES:
            torch.testing.assert_close(
                sparse_divergence(student, targets, k=3, tail=tail, temperature=temperature),
                sparse_divergence(student, targets.narrow(3), tail=tail, temperature=temperature),
            )


def test_a_function_serves_in_place_of_a_name():
    student, teacher = random_logits(2, 8, 1), random_logits(2, 8, 2)
    named = dense_divergence(student, teacher, "todi", beta=2.0)
    assert dense_divergence(student, teacher, todi, beta=2.0).equal(named)
    skewed = functools.partial(skew_forward_kl, lam=0.5)
    p, q = probabilities(teacher[0]), probabilities(student[0])
    expected = reference.skew_forward_kl(p, q, lam=0.5)
    assert dense_divergence(student, teacher, skewed)[0].item() == pytest.approx(expected)

    def squares(teacher, student):
        return (teacher.exp() - student.exp()).square().sum(-1)

    found = sparse_divergence(student, sparsify(teacher, 3), squares, tail="none")
    kept = reference.top_k(p, 3)
    assert found[0].item() == pytest.approx(((p - q)[kept] ** 2).sum())


@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
def test_a_function_that_gives_no_value_a_position_is_refused(tail):
    student, teacher = random_logits(8, 33, 1), random_logits(8, 33, 2)
    targets = sparsify(teacher, 4, num_tail_samples=2)

    def unsummed(teacher, student):
        return (teacher.exp() - student.exp()).square()

    message = r"divergence unsummed returns \[8, \d+\] for log-probs of shape .*; expected a tensor of shape \[8\], one"
    with pytest.raises(ConfigError, match=message):
        sparse_divergence(student, targets, unsummed, tail=tail)
    with pytest.raises(ConfigError, match=message):
        dense_divergence(student, teacher, unsummed)
    with pytest.raises(ConfigError, match=r"returns float for"):
        dense_divergence(student, teacher, lambda teacher, student: 0.0)


@pytest.mark.parametrize("function", [lambda logprobs: logprobs, "os:getcwd"])
def test_a_function_that_does_not_take_both_models_is_refused_before_a_run(function):
    with pytest.raises(ConfigError, match="cannot be called with two tensors, the log-probs of teacher and student"):
        DistillationConfig(divergence=function)


def test_a_divergence_carries_its_own_curvature():
    """Its value near q = p over forward KL's, which weights the sampled tail."""
    student, teacher = random_logits(4, 12, 1), random_logits(4, 12, 2)
    targets = sparsify(teacher, 4, num_tail_samples=2)

    def squares(teacher, student):
        return (teacher.exp() - student.exp()).square().sum(-1)

    weighted = near_teacher(3.0)(lambda teacher, student: squares(teacher, student))
    for function, weight in ((squares, 1.0), (weighted, 3.0), ("jeffreys", 2.0), ("js", 0.25), ("todi", 2.5)):
        found = sparse_divergence(student, targets, function, beta=1.5)
        torch.testing.assert_close(
            found, sparse_divergence(student, targets, function, beta=1.5, tail_weight=weight), msg=str(function)
        )
    near = teacher + 1e-4 * random_logits(4, 12, 3)
    for name in ("jeffreys", "js", "skew_forward_kl", "skew_reverse_kl", "alpha_mixture", "concrete_score"):
        ratio = dense_divergence(near, teacher, name) / dense_divergence(near, teacher, "forward_kl")
        torch.testing.assert_close(ratio, torch.full_like(ratio, resolve(name, 1.0).curvature), rtol=1e-3, atol=0)


@pytest.mark.parametrize("divergence", [name for name in SMOOTH if name != "alpha_beta"])
def test_the_strength_of_a_divergence_is_its_gradient_over_forward_kls_near_the_teacher(divergence):
    teacher = random_logits(4, 12, 2, scale=1.0)
    near = (teacher + 1e-4 * random_logits(4, 12, 3)).requires_grad_()
    found, forward = (
        gradient(dense_divergence(near, teacher, name, beta=0.5), near) for name in (divergence, "forward_kl")
    )
    torch.testing.assert_close(
        found, resolve(divergence, 0.5).strength * forward, rtol=1e-2, atol=1e-3 * forward.abs().max().item()
    )


# The divergences that take parameters


def test_the_alpha_mixture_at_minus_one_is_the_skew_forward_kl_and_at_one_geometric():
    student, teacher = random_logits(4, 12, 1).requires_grad_(), random_logits(4, 12, 2)
    mixture = functools.partial(alpha_mixture, alpha=-1.0)
    for tail in ("bucket", "none"):
        found, skew = (
            sparse_divergence(student, sparsify(teacher, 4), each, tail=tail) for each in (mixture, "skew_forward_kl")
        )
        torch.testing.assert_close(found, skew)
        torch.testing.assert_close(gradient(found, student), gradient(skew, student))
    geometric = (0.3 * teacher.log_softmax(-1) + 0.7 * student.log_softmax(-1)).log_softmax(-1)
    found = dense_divergence(student, teacher, functools.partial(alpha_mixture, alpha=1.0, lam=0.3))
    torch.testing.assert_close(found, dense_divergence(geometric, teacher, "forward_kl"))


@pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.0, 0.5, 1.0, 3.0])
def test_the_alpha_mixture_equals_the_reference_at_any_alpha(alpha):
    student, teacher = random_logits(3, 9, 1), random_logits(3, 9, 2)
    found = dense_divergence(student, teacher, functools.partial(alpha_mixture, alpha=alpha, lam=0.4))
    expected = [
        reference.alpha_mixture(probabilities(t), probabilities(s), alpha, 0.4)
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_concrete_score_has_the_gradient_of_differences_of_logits():
    student, teacher = random_logits(3, 9, 1).requires_grad_(), random_logits(3, 9, 2)
    q, difference = student.detach().softmax(-1), student.detach() - teacher
    expected = q * (difference - (q * difference).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(dense_divergence(student, teacher, "concrete_score"), student), expected)


def test_the_entropy_gate_takes_forward_kl_where_the_teacher_is_unsure():
    teacher = torch.tensor([[9.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    student = random_logits(2, 3, 1)
    found = dense_divergence(student, teacher, functools.partial(entropy_gate, threshold=0.9))
    forward, reverse = (dense_divergence(student, teacher, name) for name in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(found, torch.stack([reverse[0], forward[1]]))


# The weights of the parts


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 2.0), (4, 1.0)])
def test_the_weighted_parts_of_forward_kl_equal_the_reference(k, temperature):
    student, teacher = random_logits(1, 11, 10).requires_grad_(), random_logits(1, 11, 11)
    enumerated, chance = every_draw(sparsify(teacher, 4, num_tail_samples=1), teacher)
    weights = {"mass_weight": 0.5, "head_weight": 3.0, "tail_weight": 0.7}
    of_each_draw = sparse_divergence(
        student.expand(len(chance), -1), enumerated, "forward_kl", temperature=temperature, k=k, **weights
    )
    expectation = (chance * of_each_draw).sum()
    p, q = probabilities(teacher[0], temperature), student.detach().numpy()[0]
    kept = reference.top_k(np.log(p), k)

    def expected(logits):
        return reference.decoupled_kl(p, np.exp(reference.log_softmax(logits, temperature)), kept, 0.5, 3.0, 0.7)

    assert expectation.item() == pytest.approx(expected(q), rel=1e-10)
    np.testing.assert_allclose(gradient(expectation, student)[0], reference.finite_difference(expected, q), atol=1e-8)


# Samples alone


@pytest.mark.parametrize("stored", [0, 4])
@pytest.mark.parametrize("tail_temperature", TEMPERATURES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", ["forward_kl", "todi"])
def test_samples_alone_estimate_forward_kl_and_its_gradient(divergence, temperature, tail_temperature, stored):
    student, teacher = random_logits(1, 11, 10).requires_grad_(), random_logits(1, 11, 11)
    targets = sparsify(teacher, stored, num_tail_samples=1, tail_temperature=tail_temperature)
    enumerated, chance = every_draw(targets, teacher)
    of_each_draw = sparse_divergence(
        student.expand(len(chance), -1), enumerated, divergence, temperature=temperature, k=0
    )
    expectation = (chance * of_each_draw).sum()
    dense = dense_divergence(student, teacher, "forward_kl", temperature=temperature)
    weight = resolve(divergence, 1.0).curvature
    assert expectation.item() == pytest.approx(weight * dense.item(), rel=1e-9)
    torch.testing.assert_close(gradient(expectation, student), weight * gradient(dense, student), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_nothing_kept_every_divergence_is_the_weighted_tail(divergence):
    student, teacher = random_logits(3, 11, 10).requires_grad_(), random_logits(3, 11, 11)
    targets = sparsify(teacher, 0, num_tail_samples=4, generator=torch.Generator().manual_seed(0))
    tail = sparse_divergence(student, targets, "forward_kl")
    found = sparse_divergence(student, targets, divergence, tail_weight=0.5, head_weight=3.0)
    torch.testing.assert_close(found, tail / 2)
    torch.testing.assert_close(gradient(found, student), gradient(tail, student) / 2)


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_without_kept_ids_and_samples_there_is_nothing_to_learn(tail):
    student, targets = random_logits(2, 9, 1), sparsify(random_logits(2, 9, 2), 4, num_tail_samples=2)
    with pytest.raises(TargetsError, match=f"with k = 0 and tail='{tail}' nothing is left of the teacher"):
        sparse_divergence(student, targets, k=0, tail=tail)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_parts_add_up_and_the_weight_of_the_masses_is_that_of_two_entries(divergence):
    student, teacher = random_logits(3, 11, 10), random_logits(3, 11, 11)
    targets = sparsify(teacher, 4)
    masses = sparse_divergence(student, targets, divergence, head_weight=0.0)
    head = sparse_divergence(student, targets, divergence, mass_weight=0.0)
    torch.testing.assert_close(masses + head, sparse_divergence(student, targets, divergence))
    for row in range(3):
        p, q = probabilities(teacher[row]), probabilities(student[row])
        kept = reference.top_k(np.log(p), 4)
        pair = (np.array([v[kept].sum(), 1 - v[kept].sum()]) for v in (p, q))
        assert masses[row].item() == pytest.approx(reference.DIVERGENCES[divergence](*pair), rel=1e-9)


def test_rows_are_taken_as_a_cache_gives_them(cache):
    rows = cache[0].targets
    student = random_logits(len(rows), cache.manifest.vocab_size, 1, dtype=torch.float32)
    expected = sparse_divergence(student, SparseTargets.from_numpy(rows), temperature=2.0)
    assert sparse_divergence(student, rows, temperature=2.0).equal(expected)
    labels = torch.zeros(len(rows), dtype=torch.long)
    found, expected = (distillation_loss(student, labels, each)[0] for each in (rows, SparseTargets.from_numpy(rows)))
    assert found.equal(expected)


def test_the_entries_of_both_models_give_the_same_as_their_logits():
    student, teacher = random_logits(3, 12, 1), random_logits(3, 12, 2)
    targets = sparsify(teacher, 4, num_tail_samples=2)
    entries, log_partition = student_entries(student, targets, 2.0)
    torch.testing.assert_close(log_partition, (student / 2).logsumexp(-1))
    torch.testing.assert_close(entries.with_bucket().exp().sum(-1), torch.ones(3, dtype=torch.float64))
    found = entry_divergence(teacher_entries(targets, 2.0), entries, DistillationConfig(beta=0.5, k=3))
    assert found.equal(sparse_divergence(student, targets, beta=0.5, k=3, temperature=2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tail": "sampled"}, "hold no samples of the tail"),
        ({"k": 5}, "k is 5, but these targets hold the top 4"),
        ({"temperature": 3.0}, "at temperature 3; these targets have 1, 2"),
    ],
)
def test_settings_that_the_targets_do_not_support_are_refused(arguments, message):
    student, targets = random_logits(2, 9, 1), sparsify(random_logits(2, 9, 2), 4)
    with pytest.raises(TargetsError, match=message):
        sparse_divergence(student, targets, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "forwardkl"}, "divergence is 'forwardkl'; expected one of todi, .*; did you mean 'forward_kl'"),
        ({"divergence": "no such:name"}, "divergence is 'no such:name'; expected one of todi"),
        ({"beta": -1.5}, "beta is -1.5; expected -1 or more"),
        ({"beta": math.nan}, "beta is nan; expected -1 or more"),
        ({"beta": math.inf}, "beta is inf; expected -1 or more"),
        ({"tail_weight": -1.0}, "tail_weight is -1.0; expected 0 or more"),
        ({"head_weight": -1.0}, "head_weight is -1.0; expected 0 or more"),
        ({"mass_weight": 2.0, "tail": "none"}, "head_weight and mass_weight .*; tail='none' has no tail"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"k": -1}, "k is -1; expected 0 or more"),
        ({"divergence": "x"}, "divergence is 'x'; expected one of todi, forward_kl, .*entropy_gate$"),
    ],
)
def test_unknown_names_and_values_out_of_range_are_refused(arguments, message):
    student, targets = random_logits(2, 9, 1), sparsify(random_logits(2, 9, 2), 4)
    with pytest.raises(ConfigError, match=message):
        sparse_divergence(student, targets, **arguments)


# Divergences of other packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package that registers divergences, only one of which it has."""
    code = "def squares(teacher, student):\n    return (teacher.exp() - student.exp()).square().sum(-1)\n\nnumber = 3\n"
    (tmp_path / "made_divergences.py").write_text(code)
    metadata = tmp_path / "made_divergences-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-divergences\nVersion: 1.0\n")
    points = ["squares = made_divergences:squares", "gone = made_divergences:gone", "number = made_divergences:number"]
    points += ["absent = made_by_nobody:squares", "todi = made_divergences:squares"]
    (metadata / "entry_points.txt").write_text("\n".join(["[todi_offline.divergences]", *points, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    installed_divergence.cache_clear()


def test_an_installed_package_may_name_a_divergence(installed):
    student, teacher = random_logits(2, 8, 1), random_logits(2, 8, 2)
    targets = sparsify(teacher, 3)
    p, q = probabilities(teacher[0]), probabilities(student[0])
    kept = reference.top_k(p, 3)
    found = sparse_divergence(student, targets, "squares", tail="none")
    assert found[0].item() == pytest.approx(((p - q)[kept] ** 2).sum())
    assert dense_divergence(student, teacher, "squares")[0].item() == pytest.approx(((p - q) ** 2).sum())
    assert dense_divergence(student, teacher, "todi").equal(dense_divergence(student, teacher, todi))
    assert sparse_divergence(student, targets, "made_divergences:squares", tail="none").equal(found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("square", "is 'square'; expected one of todi, .*entropy_gate, absent, gone, .*; did you mean 'squares'"),
        ("gone", "'gone' cannot be loaded from made_divergences:gone: .*no attribute 'gone'"),
        ("absent", "'absent' cannot be loaded from made_by_nobody:squares: No module named 'made_by_nobody'"),
        ("made_divergences:gone", "'made_divergences:gone' cannot be loaded: "),
        ("number", "'number' is 3; expected a function of two tensors"),
    ],
)
def test_a_divergence_that_no_package_has_is_refused(name, message, installed):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(divergence=name)
