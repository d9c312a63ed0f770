"""Sparse targets: top k, tail mass and tail samples, compared with float64, and how they are narrowed."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

import todi_offline.targets.sparse
import todi_offline.tuning
from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import TargetsError, TeacherOutputError
from todi_offline.losses import dense_divergence, sparse_divergence
from todi_offline.targets.sparse import SparseTargets, sparsify, teacher_targets

seeded = settings(derandomize=True, deadline=None, max_examples=60)


def random_logits(num_targets, vocab, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_targets, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_uniforms(num_targets, num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_targets, num_samples, generator=generator, dtype=torch.float64)


def test_the_top_k_and_the_tail_equal_the_reference():
    logits = random_logits(6, 40)
    targets = sparsify(logits, k=7, temperatures=(1.0, 2.0, 0.5))
    for row, ids, logprobs, tails in zip(
        logits.numpy(), targets.ids, targets.logprobs, targets.tail_logsumexp, strict=True
    ):
        expected = reference.log_softmax(row)
        kept = reference.top_k(expected, 7)
        assert ids.tolist() == kept
        np.testing.assert_allclose(logprobs, expected[kept], rtol=1e-5)
        for temperature, tail in zip((1.0, 2.0, 0.5), tails.tolist(), strict=True):
            assert tail == pytest.approx(reference.tail_logsumexp(expected, kept, temperature), abs=1e-5)
    assert targets.ids.dtype == torch.int64
    assert targets.logprobs.dtype == targets.tail_logsumexp.dtype == torch.float32
    assert len(targets) == 6


@seeded
@given(
    rows=st.integers(1, 12).flatmap(
        lambda vocab: st.lists(
            st.lists(st.sampled_from([-math.inf, 0.0, 0.5, 1.0, 2.0]), min_size=vocab, max_size=vocab).filter(
                lambda row: max(row) > -math.inf
            ),
            min_size=1,
            max_size=4,
        )
    ),
    data=st.data(),
)
def test_among_equal_logits_the_smallest_ids_win(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    targets = sparsify(torch.tensor(rows), k)
    assert targets.ids.tolist() == [reference.top_k(np.array(row), k) for row in rows]
    assert not targets.tail_logsumexp.isnan().any()


@pytest.mark.parametrize("vocab", [151_936, 262_144])
def test_ties_of_a_bfloat16_head_over_a_real_vocabulary_are_settled_as_by_a_stable_sort(vocab):
    logits = random_logits(3, vocab, dtype=torch.bfloat16)
    targets = sparsify(logits, k=64)
    exact = logits.float().log_softmax(-1)
    ids = exact.sort(dim=-1, descending=True, stable=True).indices
    boundary = exact.gather(-1, ids)
    assert (boundary[:, 63] == boundary[:, 64]).any(), "no tie at the k-th place: the test shows nothing"
    assert targets.ids.equal(ids[:, :64])
    tail = logits.double().log_softmax(-1).gather(-1, ids[:, 64:])
    for column, temperature in enumerate((1.0, 2.0)):
        expected = (tail / temperature).logsumexp(-1)
        torch.testing.assert_close(targets.tail_logsumexp[:, column].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lost", [1e-4, 1e-9, 1e-15])
def test_a_small_tail_is_exact_where_one_minus_the_sum_is_lost(lost):
    probabilities = np.array([0.6, 0.4 - lost, lost / 4, lost * 3 / 4])
    targets = sparsify(torch.tensor(np.log(probabilities)[None], dtype=torch.float32), k=2, temperatures=(1.0,))
    assert targets.tail_logsumexp.item() == pytest.approx(math.log(lost), abs=1e-4)
    if lost < 1e-8:
        assert 1 - targets.logprobs.exp().sum().item() != pytest.approx(lost, rel=0.5, abs=0)


def test_float64_logits_stay_float64_and_are_not_changed():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = random_logits(2, 10, dtype=dtype)
        before = logits.clone()
        targets = sparsify(logits, 3, num_tail_samples=2)
        assert logits.equal(before)
        assert targets.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_targets_take_no_gradient():
    targets = sparsify(random_logits(2, 10).requires_grad_(), 3, num_tail_samples=2)
    assert not targets.logprobs.requires_grad
    assert not targets.tail_logsumexp.requires_grad


def test_a_whole_vocabulary_kept_leaves_no_tail():
    targets = sparsify(random_logits(2, 5), k=5)
    assert (targets.tail_logsumexp == -math.inf).all()
    torch.testing.assert_close(targets.log_partition(1.0), torch.zeros(2), atol=1e-6, rtol=0)


def test_the_log_partition_is_that_of_the_whole_vocabulary():
    logits = random_logits(4, 30, dtype=torch.float64)
    targets = sparsify(logits, 5, temperatures=(1.0, 2.0))
    expected = (logits.log_softmax(-1) / 2).logsumexp(-1)
    torch.testing.assert_close(targets.log_partition(2.0), expected)
    torch.testing.assert_close(targets.log_partition(1.0), torch.zeros(4, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_temperature_that_was_not_captured_is_refused_with_those_that_were():
    targets = sparsify(random_logits(2, 10), 3, temperatures=(1.0, 2.0))
    with pytest.raises(TargetsError, match=r"at temperature 1\.5; these targets have 1, 2"):
        targets.log_partition(1.5)


@seeded
@given(vocab=st.integers(2, 30), data=st.data(), seed=st.integers(0, 1000))
def test_narrowing_equals_a_capture_with_a_smaller_k(vocab, data, seed):
    k = data.draw(st.integers(1, vocab))
    smaller = data.draw(st.integers(1, k))
    logits = (random_logits(3, vocab, seed) * 2).round() / 2
    narrowed = sparsify(logits, k, temperatures=(1.0, 2.0, 0.5)).narrow(smaller)
    expected = sparsify(logits, smaller, temperatures=(1.0, 2.0, 0.5))
    assert narrowed.ids.equal(expected.ids)
    torch.testing.assert_close(narrowed.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(narrowed.tail_logsumexp, expected.tail_logsumexp, atol=1e-5, rtol=1e-5)


def test_narrowing_leaves_no_samples_and_refuses_more_than_is_stored():
    targets = sparsify(random_logits(2, 10), 4, num_tail_samples=3)
    assert targets.narrow(2).tail_ids is None
    for k in (0, 5):
        with pytest.raises(TargetsError, match="hold the top 4; choose 1 to 4"):
            targets.narrow(k)


@pytest.mark.parametrize("tail_temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab", [30, 256, 1000])  # less than a block of columns, one, several and a part
def test_samples_equal_those_of_plain_inversion(tail_temperature, vocab):
    logits, uniforms = random_logits(5, vocab), random_uniforms(5, 16)
    targets = sparsify(logits, 4, uniforms=uniforms, tail_temperature=tail_temperature)
    for row in range(5):
        logprobs = reference.log_softmax(logits[row].numpy())
        kept = reference.top_k(logprobs, 4)
        drawn = [reference.draw(logprobs, kept, u, tail_temperature) for u in uniforms[row].tolist()]
        assert targets.tail_ids[row].tolist() == drawn
        np.testing.assert_allclose(targets.tail_logprobs[row], logprobs[drawn], rtol=1e-5)
        conditional = reference.conditional_tail(logprobs, kept, tail_temperature)
        expected = [math.log(conditional[j]) for j in drawn]
        np.testing.assert_allclose(targets.proposal_logprobs()[row], expected, atol=1e-5)


def test_evenly_spread_uniforms_draw_each_id_as_often_as_it_is_probable():
    num_samples = 10_000
    uniforms = ((torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples)[None]
    logits = random_logits(1, 12, scale=1.5)
    targets = sparsify(logits, 3, uniforms=uniforms)
    counts = torch.bincount(targets.tail_ids[0], minlength=12)
    conditional = reference.conditional_tail(reference.log_softmax(logits[0].numpy()), targets.ids[0].tolist(), 1.0)
    for j, probability in conditional.items():
        assert abs(counts[j].item() - probability * num_samples) <= 1
    assert counts[targets.ids[0]].sum() == 0


def test_an_id_without_probability_is_never_drawn():
    logits = torch.tensor([[3.0, -math.inf, 1.0, 1.0, -math.inf, 2.0, -math.inf]])
    uniforms = torch.tensor([[0.0, 1e-300, 0.5, 1 - 2**-53, 1.0]], dtype=torch.float64)
    targets = sparsify(logits, 2, uniforms=uniforms)
    assert targets.tail_ids.tolist() == [[2, 2, 3, 3, 3]]


def test_a_tail_far_below_the_top_is_still_sampled():
    logits = torch.tensor([[0.0, -2000.0, -2001.0, -math.inf]])
    targets = sparsify(logits, 1, uniforms=torch.tensor([[0.1, 0.9]], dtype=torch.float64))
    assert targets.tail_ids.tolist() == [[1, 2]]


def test_a_row_whose_tail_has_no_mass_holds_samples_without_probability():
    logits = torch.tensor([[2.0, 1.0, -math.inf, -math.inf], [2.0, 1.0, 0.0, -math.inf]])
    targets = sparsify(logits, 2, uniforms=random_uniforms(2, 3))
    assert targets.tail_logsumexp[0].tolist() == [-math.inf, -math.inf]
    assert targets.tail_logprobs[0].tolist() == [-math.inf] * 3
    assert targets.proposal_logprobs()[0].tolist() == [0.0] * 3
    assert targets.tail_ids[1].tolist() == [2, 2, 2]


def test_a_row_does_not_depend_on_its_neighbours():
    logits, uniforms = random_logits(9, 300, dtype=torch.bfloat16), random_uniforms(9, 4)
    together = sparsify(logits, 16, uniforms=uniforms)
    order = torch.tensor([4, 0, 8, 2])
    for rows in (order, slice(3, 4), slice(5, 9)):
        apart = sparsify(logits[rows], 16, uniforms=uniforms[rows])
        assert apart.ids.equal(together[rows].ids)
        assert apart.tail_ids.equal(together[rows].tail_ids)
        torch.testing.assert_close(apart.logprobs, together[rows].logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(apart.tail_logsumexp, together[rows].tail_logsumexp, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_targets_are_the_same_bits_however_few_rows_are_copied_together(rows, monkeypatch):
    logits, uniforms = random_logits(5, 700), torch.linspace(0, 0.99, 15, dtype=torch.float64).view(5, 3)
    whole = sparsify(logits, 4, uniforms=uniforms)
    monkeypatch.setattr(todi_offline.tuning, "CPU_COPY_BYTES", rows * logits.itemsize * 700)
    found = sparsify(logits, 4, uniforms=uniforms)
    for name in ("ids", "logprobs", "tail_logsumexp", "tail_ids", "tail_logprobs"):
        assert getattr(found, name).equal(getattr(whole, name))


def test_a_generator_decides_the_samples():
    logits = random_logits(3, 50)
    first, again, other = (
        sparsify(logits, 4, num_tail_samples=8, generator=torch.Generator().manual_seed(seed)).tail_ids
        for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_labels_come_with_their_log_probs_kept_or_not():
    logits, uniforms = random_logits(4, 20), random_uniforms(4, 2)
    labels = torch.tensor([0, 5, 19, 7])
    targets, label_logprobs, _ = teacher_targets(logits, labels, 3, (1.0, 2.0), uniforms)
    expected = sparsify(logits, 3, uniforms=uniforms)
    torch.testing.assert_close(label_logprobs, logits.log_softmax(-1)[torch.arange(4), labels])
    for name in ("ids", "logprobs", "tail_logsumexp", "tail_ids", "tail_logprobs"):
        assert getattr(targets, name).equal(getattr(expected, name))


def test_no_columns_of_uniforms_mean_no_samples():
    targets, *_ = teacher_targets(random_logits(2, 8), torch.tensor([0, 1]), 8, uniforms=random_uniforms(2, 0))
    assert targets.tail_ids is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0, but the vocabulary has 8 ids; choose 1 to 8"),
        ({"k": 9}, "k is 9, but the vocabulary has 8 ids; choose 1 to 8"),
        ({"k": 2, "temperatures": ()}, "temperatures are none; expected one or more positive"),
        ({"k": 2, "temperatures": (1.0, 0.0)}, "temperatures are 1, 0; expected one or more positive"),
        ({"k": 2, "temperatures": (1.0, math.nan)}, "temperatures are 1, nan; expected one or more positive"),
        ({"k": 2, "temperatures": (1.0, 2.0, 1.0)}, "temperatures are 1, 2, 1; name each once"),
        ({"k": 8, "num_tail_samples": 1}, "k = 8 keeps the whole vocabulary"),
        (
            {"k": 2, "num_tail_samples": 1, "tail_temperature": 3.0},
            "tail_temperature is 3, not one of .* 1, 2",
        ),
    ],
)
def test_impossible_captures_are_refused(arguments, message):
    with pytest.raises(TargetsError, match=message):
        sparsify(random_logits(2, 8), **arguments)


@pytest.mark.parametrize(("logit", "found"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "nothing but -inf")])
def test_a_row_without_a_softmax_is_named(logit, found):
    logits = random_logits(5, 8)
    logits[3] = -math.inf
    logits[3, 6] = logit
    with pytest.raises(TeacherOutputError, match=f"row 3 of the teacher's logits holds {found}") as caught:
        sparsify(logits, 2)
    assert caught.value.row == 3


def test_samples_that_cannot_be_weighted_do_not_become_targets():
    with pytest.raises(TargetsError, match="at temperature 1; these targets have 2"):
        SparseTargets(
            ids=torch.tensor([[0]]),
            logprobs=torch.tensor([[-1.0]]),
            tail_logsumexp=torch.tensor([[-0.5]]),
            temperatures=(2.0,),
            tail_ids=torch.tensor([[1]]),
            tail_logprobs=torch.tensor([[-2.0]]),
        )


def test_targets_without_samples_have_no_proposal():
    with pytest.raises(TargetsError, match="hold no samples of the tail"):
        sparsify(random_logits(1, 8), 2).proposal_logprobs()


@pytest.mark.parametrize("num_samples", [0, 3])
def test_rows_of_a_cache_become_targets(num_samples):
    made = sparsify(random_logits(4, 30), 5, uniforms=random_uniforms(4, num_samples))
    sampled = num_samples > 0
    rows = TargetRows(
        ids=made.ids.numpy().astype(np.uint16),
        logprobs=made.logprobs.numpy().astype(np.float16).astype(np.float32),
        tail_logsumexp=made.tail_logsumexp.numpy(),
        label_logprob=np.zeros(4, np.float32),
        temperatures=made.temperatures,
        tail_ids=made.tail_ids.numpy().astype(np.uint32) if sampled else None,
        tail_logprobs=made.tail_logprobs.numpy() if sampled else None,
    )
    read = SparseTargets.from_numpy(rows)
    assert read.ids.equal(made.ids)
    assert read.logprobs.dtype == torch.float32
    torch.testing.assert_close(read.logprobs, made.logprobs, atol=1e-2, rtol=0)
    assert read.tail_logsumexp.equal(made.tail_logsumexp)
    assert read.temperatures == made.temperatures
    assert (read.tail_ids is not None) == sampled
    if sampled:
        assert read.tail_ids.equal(made.tail_ids)
        assert read.tail_logprobs.equal(made.tail_logprobs)


def test_targets_move_and_are_indexed_with_all_their_tensors():
    targets = sparsify(random_logits(6, 30), 5, num_tail_samples=2)
    mask = torch.tensor([True, False, True, False, False, True])
    for part in (targets[mask], targets[1:4], targets[torch.tensor([5, 0, 1])], targets[0:3].to("cpu")):
        assert len(part) == len(part.logprobs) == len(part.tail_logsumexp) == len(part.tail_ids) == 3
        assert part.temperatures == targets.temperatures
    assert targets.to("meta").tail_logprobs.device.type == "meta"


def test_no_rows_are_no_trouble():
    targets = sparsify(random_logits(0, 10), 3, num_tail_samples=2)
    assert targets.ids.shape == (0, 3)
    assert targets.tail_logsumexp.shape == (0, 2)
    assert targets.tail_ids.shape == (0, 2)
    assert targets.narrow(2).ids.shape == (0, 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("columns", [slice(None), slice(0, 2), slice(1, 2)])
def test_stratified_samples_estimate_the_tails_divergence_without_bias(columns, temperature):
    """Integrated exactly: the tail's shares are multiples of 1/24, and a midpoint lies in each 24th of [0, 1)."""
    teacher = torch.tensor([0.3, 0.2, 0.3 * 6 / 24, 0.3 * 3 / 24, 0.3 * 12 / 24, 0.3 * 3 / 24, 0.2]).double().log()
    student = random_logits(1, 7, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(3))), dtype=torch.float64)
    inside = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    uniforms = ((orders[:, None] + inside[None, :, None]) / 3).flatten(0, 1)  # one jitter for all: a mean is linear
    targets = sparsify(teacher.expand(len(uniforms), -1), 3, uniforms=uniforms[:, columns])
    found = sparse_divergence(student.expand(len(uniforms), -1), targets, "forward_kl", temperature=temperature)
    exact = dense_divergence(student, teacher[None], "forward_kl", temperature=temperature)
    assert found.std() > 0.01
    torch.testing.assert_close(found.mean(), exact[0])
