"""Divergences by name, as functions and from other packages; targets as a cache gives them."""

import functools
import math

import pytest
import torch
from support import reference
from support.divergences import SMOOTH, TEMPERATURES, gradient, probabilities, random_logits

from todi_offline.errors import ConfigError, TargetsError
from todi_offline.losses import DistillationConfig, dense_divergence, distillation_loss, sparse_divergence
from todi_offline.losses.divergences import installed_divergence, near_teacher, resolve, skew_forward_kl, todi
from todi_offline.losses.entries import entry_divergence, student_entries, teacher_entries
from todi_offline.targets.sparse import SparseTargets, sparsify

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
        ({"mass_weight": 2.0, "tail": "none"}, "head_weight and mass_weight need a tail, and tail is 'none'"),
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
