"""Finding the k largest by groups; test_targets covers the order of equal values."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from todi_offline.targets.top_k import _largest, _top_k_without_reads, top_k


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    vocab=st.integers(1, 300), count=st.integers(1, 9), levels=st.integers(1, 400), seed=st.integers(0, 999),
    broken=st.sampled_from([None, math.nan, math.inf, -math.inf]),
)  # fmt: skip
def test_the_largest_of_a_row_are_found_by_groups_as_without(vocab, count, levels, seed, broken):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, vocab), generator=generator).float()
    if broken is not None:
        logits[1, seed % vocab] = broken
    count = min(count, vocab)
    values, ids = _largest(logits, count)
    torch.testing.assert_close(values, logits.topk(count).values, equal_nan=True)
    torch.testing.assert_close(logits.gather(-1, ids), values, equal_nan=True)
    assert all(len(set(row)) == count for row in ids.tolist())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(vocab=st.integers(1, 300), k=st.integers(0, 9), levels=st.integers(1, 400), seed=st.integers(0, 999))
def test_without_reads_the_same_are_found_and_equal_ones_in_the_same_order(vocab, k, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, vocab), generator=generator).float()
    logits[0, seed % vocab :] = -math.inf
    logits[1, seed % vocab] = math.inf
    for found, expected in zip(_top_k_without_reads(logits, k), top_k(logits, k), strict=True):
        assert found.equal(expected)


def test_without_reads_a_row_with_nan_has_ids_of_the_vocabulary():
    logits = torch.zeros(2, 1000)
    logits[0, 7] = logits[1] = math.nan
    values, ids, _ = _top_k_without_reads(logits, 4)
    assert values[:, 0].isnan().all()
    assert ((ids >= 0) & (ids < 1000)).all()
