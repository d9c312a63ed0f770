"""Finding the k largest by groups; test_targets covers the order of equal values."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from todi_offline.targets.top_k import _largest


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
