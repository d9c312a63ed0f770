"""The positions that are distilled: the selection, the weights and the resulting loss."""

import math

import pytest
import torch
from support import reference

from todi_offline.errors import ConfigError
from todi_offline.losses import DistillationConfig, distillation_loss, sparse_divergence
from todi_offline.losses.positions import Selection, parse_selection, position_weights, student_entropy
from todi_offline.targets.sparse import sparsify


def case(num_targets=10, vocab=20, seed=0):
    """Return student logits, labels and targets."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_targets, vocab, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(vocab, (num_targets,), generator=generator)
    return student.requires_grad_(), labels, sparsify(teacher, 5, num_tail_samples=3, generator=generator)


def entropies(logits):
    """The obvious formula."""
    rows = [reference.log_softmax(row) for row in logits.detach().numpy()]
    return torch.tensor([-math.fsum(math.exp(x) * x for x in row) for row in rows])


def test_the_entropy_equals_the_reference_and_zero_probabilities_add_zero():
    student, _, _ = case()
    torch.testing.assert_close(student_entropy(student), entropies(student).double())
    assert not student_entropy(student).requires_grad
    assert student_entropy(torch.tensor([[0.0, -math.inf, 0.0]])).item() == pytest.approx(math.log(2))


def test_student_entropy_selects_where_the_student_is_least_sure():
    entropy = torch.tensor([0.1, 3.0, 2.0, 0.5, 2.5])
    found = position_weights(Selection("student-entropy", 0.4), entropy, torch.tensor([9.0, 0, 0, 0, 0]))
    assert found.tolist() == [0, 2.5, 0, 0, 2.5]


def test_tip_also_selects_where_the_student_is_sure_and_far_from_the_teacher():
    entropy = torch.tensor([0.1, 3.0, 2.0, 0.5, 2.5])
    reverse_kl = torch.tensor([9.0, 0.0, 0.0, 0.1, 0.0])
    found = position_weights(Selection("tip", 0.4), entropy, reverse_kl)
    assert found.tolist() == [2.5, 2.5, 0, 0, 0]
    h, d = entropy / 3, reverse_kl / 9
    order = (h + d - h * d).argsort(descending=True).tolist()
    for num_selected in range(1, 6):
        found = position_weights(Selection("tip", num_selected / 5), entropy, reverse_kl)
        assert found.nonzero().flatten().tolist() == sorted(order[:num_selected])


@pytest.mark.parametrize(("num_rows", "share", "num_selected"), [(10, 0.2, 2), (11, 0.2, 3), (3, 0.01, 1), (4, 1.0, 4)])
def test_the_share_is_rounded_up_and_the_weights_add_up_to_the_rows(num_rows, share, num_selected):
    entropy = torch.zeros(num_rows)  # all alike: the first are selected
    found = position_weights(Selection("student-entropy", share), entropy, entropy)
    assert found.nonzero().flatten().tolist() == list(range(num_selected))
    assert found.sum().item() == pytest.approx(num_rows)


def test_there_may_be_no_rows():
    for rule in ("student-entropy", "tip"):
        assert position_weights(Selection(rule, 0.5), torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
@pytest.mark.parametrize("rule", ["student-entropy", "tip"])
def test_kd_is_the_mean_over_the_selected_rows_and_cross_entropy_over_all(rule, kd_weight):
    student, labels, targets = case()
    config = DistillationConfig(positions=f"{rule}:0.3", kd_weight=kd_weight)
    loss, sums = distillation_loss(student, labels, targets, config)
    rows = sparse_divergence(student, targets)
    reverse = sparse_divergence(student, targets, "reverse_kl", tail="bucket").detach()
    entropy = entropies(student).double()
    h, d = entropy / entropy.max(), reverse / reverse.max()
    score = entropy if rule == "student-entropy" else h + d - h * d
    selected = score.argsort(descending=True)[:3]
    expected = (1 - kd_weight) * torch.nn.functional.cross_entropy(student, labels) + kd_weight * rows[selected].mean()
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(each, student, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert sums["kd"].item() == pytest.approx(10 * rows[selected].mean().item())
    assert sums["num_targets"] == 10


def test_with_every_position_selected_nothing_changes():
    given = case()
    for rule in ("student-entropy", "tip"):
        found, _ = distillation_loss(*given, DistillationConfig(positions=f"{rule}:1"))
        torch.testing.assert_close(found, distillation_loss(*given)[0])


@pytest.mark.parametrize("text", ["", "some", "student-entropy", "tip:0", "tip:1.1", "tip:nan", "tip:x", "entropy:0.5"])
def test_a_selection_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected all, student-entropy:SHARE or tip:SHARE"):
        DistillationConfig(positions=text)


def test_a_selection_is_read_from_its_text():
    assert parse_selection("all") is None
    assert parse_selection("tip:0.5") == Selection("tip", 0.5)
