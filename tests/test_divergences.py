"""Divergences, dense and sparse, compared with the float64 formulas in `support/reference.py`."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.divergences import (
    F_DIVERGENCES,
    SMOOTH,
    TEMPERATURES,
    every_draw,
    gradient,
    probabilities,
    random_logits,
    seeded,
)

from todi_offline.losses import DIVERGENCES, dense_divergence, sparse_divergence
from todi_offline.losses.divergences import alpha_mixture, entropy_gate
from todi_offline.targets.sparse import sparsify

GOLDEN_TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()


GOLDEN_STUDENT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()


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
