"""The storage layouts of other systems that `benchmarks bytes` rebuilds."""

import numpy as np
import pytest

from benchmarks._distillkit import BUDGET, RECOMMENDED, Layout


def logprobs(num_targets=6, k=30, seed=0):
    """Falling log-probs, each row shuffled."""
    generator = np.random.default_rng(seed)
    values = -np.sort(generator.gamma(2.0, 2.0, (num_targets, k)), axis=1)
    return generator.permuted(values, axis=1).astype(np.float32)


def test_the_bytes_of_distillkit_are_those_that_its_readme_names():
    assert sum(BUDGET.num_bytes(50, 49_152).values()) == 114
    assert RECOMMENDED.num_bytes(128, 131_072) == {"topk_ids": 272, "topk_logprobs": 56}


def test_the_first_log_probs_come_back_in_bfloat16_and_the_others_as_the_polynomial_fits_them():
    given = logprobs()
    back = RECOMMENDED.read_back(given)
    for row, found in zip(given, back, strict=True):
        order = np.argsort(-row)
        np.testing.assert_allclose(found[order[:16]], row[order[:16]], rtol=2**-8)
        ranks = np.arange(14.0)
        terms = np.stack([np.ones(14), ranks, ranks**2, ranks**3, ranks**4, np.sqrt(ranks)], axis=1)
        expected = terms @ np.linalg.lstsq(terms, row[order[16:]], rcond=None)[0]
        np.testing.assert_allclose(found[order[16:]], expected, atol=2e-3)


def test_a_curve_of_its_own_terms_comes_back_whole():
    ranks = np.arange(20.0)
    curve = -1 - 0.1 * ranks - 0.3 * np.sqrt(ranks)
    back = Layout(0, (0, 1, 0.5)).read_back(curve[None].astype(np.float32))
    np.testing.assert_allclose(back[0], curve, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "k", "fits"), [(RECOMMENDED, 16, False), (RECOMMENDED, 23, True), (BUDGET, 8, True)]
)
def test_a_polynomial_needs_more_values_than_coefficients(layout, k, fits):
    assert layout.fits(k) == fits
