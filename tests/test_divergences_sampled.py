"""Divergences estimated from samples of the teacher's tail, with kept ids and without."""

import numpy as np
import pytest
import torch
from support import reference
from support.divergences import TEMPERATURES, every_draw, gradient, probabilities, random_logits

from todi_offline.errors import TargetsError
from todi_offline.losses import DIVERGENCES, dense_divergence, sparse_divergence
from todi_offline.losses.divergences import resolve
from todi_offline.targets.sparse import SparseTargets, sparsify

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
    with pytest.raises(TargetsError, match=f"k = 0 uses only tail samples, and tail is '{tail}'"):
        sparse_divergence(student, targets, k=0, tail=tail)
