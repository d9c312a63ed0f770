"""The training objective: the weights of its terms, and how it uses labels and targets."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from support import reference
from torch.nn.functional import cross_entropy

from todi_offline.errors import ConfigError, TargetsError
from todi_offline.losses import DIVERGENCES, DistillationConfig, distillation_loss, sparse_divergence
from todi_offline.targets.sparse import sparsify


def case(num_targets=6, vocab=20, k=5, num_tail_samples=0, dtype=torch.float64, seed=0):
    """Return student logits, labels and targets."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_targets, vocab, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(vocab, (num_targets,), generator=generator)
    targets = sparsify(teacher.to(dtype), k, num_tail_samples=num_tail_samples, generator=generator)
    return student.to(dtype).requires_grad_(), labels, targets


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_tail_samples", [0, 3])
def test_the_loss_is_the_weighted_mean_of_both_parts(num_tail_samples, temperature, kd_weight):
    student, labels, targets = case(num_tail_samples=num_tail_samples)
    config = DistillationConfig(temperature=temperature, kd_weight=kd_weight)
    loss, _ = distillation_loss(student, labels, targets, config)
    kd = sparse_divergence(student, targets, temperature=temperature).mean()
    ce = cross_entropy(student, labels)
    assert ce.item() == pytest.approx(reference.mean_cross_entropy(student.detach().numpy(), labels.tolist()))
    expected = (1 - kd_weight) * ce + kd_weight * kd
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_setting_reaches_the_divergence(divergence):
    student, labels, targets = case(num_tail_samples=3)
    settings = {"beta": 0.5, "temperature": 2.0, "k": 3, "tail": "sampled", "tail_weight": 0.7}
    config = DistillationConfig(divergence=divergence, kd_weight=1.0, **settings)
    loss, sums = distillation_loss(student, labels, targets, config)
    expected = sparse_divergence(student, targets, divergence, **settings)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(sums["kd"], expected.sum().detach())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_weight_the_divergence_is_reported_but_not_trained_on(temperature):
    student, labels, targets = case(num_tail_samples=3)
    loss, sums = distillation_loss(student, labels, targets, DistillationConfig(temperature=temperature, kd_weight=0.0))
    torch.testing.assert_close(gradient(loss, student), gradient(cross_entropy(student, labels), student))
    expected = sparse_divergence(student, targets, temperature=temperature).sum().detach()
    torch.testing.assert_close(sums["kd"], expected)


def test_without_weight_the_divergence_builds_no_graph():
    seen = []

    def watched(teacher, student):
        seen.append(torch.is_grad_enabled())
        return (student.exp() - teacher.exp()).square().sum(-1)

    for kd_weight in (0.0, 0.5):
        distillation_loss(*case(), DistillationConfig(divergence=watched, kd_weight=kd_weight))
    assert seen == [False, True]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_gradients_of_micro_batches_add_up_to_those_of_one_batch(as_tensor):
    student, labels, targets = case(num_targets=7, num_tail_samples=3)
    whole, sums = distillation_loss(student, labels, targets)
    num_targets = torch.tensor(7) if as_tensor else 7
    losses, parts = [], []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 7)):
        loss, part = distillation_loss(student[rows], labels[rows], targets[rows], num_targets=num_targets)
        losses.append(loss)
        parts.append(part)
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(gradient(sum(losses), student), gradient(whole, student))
    for name, value in sums.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_logged_sums_equal_the_reference(temperature, k):
    student, labels, targets = case(num_tail_samples=3)
    options = {"temperature": temperature, "k": k, "beta": 3.0}
    _, sums = distillation_loss(student, labels, targets, DistillationConfig(**options))
    expected = dict.fromkeys(sums, 0.0)
    for row in range(len(labels)):
        q = np.exp(reference.log_softmax(student[row].detach().numpy(), temperature))
        kept = targets.ids[row, :k].tolist()
        q = reference.with_bucket(q, kept)
        partition = targets.log_partition(temperature)[row].item()
        p = np.exp(targets.logprobs[row, :k].numpy() / temperature - partition)
        p = np.append(p, 1 - p.sum())
        expected["forward_kl"] += reference.forward_kl(p, q)
        expected["reverse_kl"] += reference.reverse_kl(p, q)
        expected["teacher_kept_mass"] += p[:-1].sum()
        expected["student_kept_mass"] += q[:-1].sum()
        expected["tail_share"] += p[-1]
        expected["share_a_above_half"] += (p > q).mean()
        expected["num_targets"] += 1
    expected["kd"] = sparse_divergence(student, targets, **options).sum().item()
    expected["cross_entropy"] = cross_entropy(student, labels, reduction="sum").item()
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in sums.values())


def test_bfloat16_logits_are_summed_in_float32():
    student, labels, targets = case(num_targets=4, vocab=5000, k=16, num_tail_samples=4, dtype=torch.bfloat16)
    loss, _ = distillation_loss(student, labels, targets)
    wide, _ = distillation_loss(student.detach().double(), labels, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wide.item(), rel=1e-5)
    assert gradient(loss, student).dtype == torch.bfloat16


def test_no_rows_give_no_loss_and_no_gradient():
    student, labels, targets = case(num_targets=0, num_tail_samples=2)
    for temperature in (1.0, 2.0):
        loss, sums = distillation_loss(student, labels, targets, DistillationConfig(temperature=temperature))
        assert loss.item() == 0
        assert gradient(loss, student).shape == (0, 20)
        assert all(value.item() == 0 for value in sums.values())


def test_a_loss_is_had_without_gradients_too():
    student, labels, targets = case()
    with torch.no_grad():
        quiet, _ = distillation_loss(student, labels, targets)
    loss, _ = distillation_loss(student, labels, targets)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss.detach())


@pytest.mark.parametrize("settings", [{"k": 6}, {"temperature": 3.0}, {"tail": "sampled"}])
def test_settings_that_the_targets_lack_are_refused_even_without_weight(settings):
    with pytest.raises(TargetsError):
        distillation_loss(*case(), DistillationConfig(kd_weight=0.0, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "todo"}, "divergence is 'todo'; .*did you mean 'todi'"),
        ({"tail": "bucked"}, "tail is 'bucked'; expected one of auto, .*; did you mean 'bucket'"),
        ({"kd_weight": -0.1}, "kd_weight is -0.1; expected 0 to 1"),
        ({"kd_weight": 1.1}, "kd_weight is 1.1"),
        ({"kd_weight": math.nan}, "kd_weight is nan"),
    ],
)
def test_a_config_is_valid_once_built(settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would notice some of it first
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**settings)
