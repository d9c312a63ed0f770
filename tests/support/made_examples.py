"""Examples of random tokens, and a comparison of their targets."""

import numpy as np

from support.tiny_models import VOCAB
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example


def assert_same_targets(found: TargetRows, expected: TargetRows) -> None:
    """Assert equality, up to the rounding of matrix products of another shape."""
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.tail_ids, expected.tail_ids)
    for name in ("logprobs", "tail_logsumexp", "label_logprob", "tail_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)


def some_examples(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(0)
    masks = [np.arange(length) % 3 == 1 for length in lengths]
    for mask in masks:
        mask[-1] = False
    return [
        Example(str(number), "made", generator.integers(0, VOCAB, length).astype(np.uint32), mask)
        for number, (length, mask) in enumerate(zip(lengths, masks, strict=True))
    ]
