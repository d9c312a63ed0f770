"""The uniform numbers that decide the tail samples of a row; test_teacher covers rows made of logits."""

import dataclasses

import numpy as np
import pytest
from support.made_examples import some_examples

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.data import Examples
from todi_offline.targets.rows import tail_uniforms

SETTINGS = CacheSettings(k=8, tail_samples=4)


def test_content_and_seed_decide_the_tail_uniforms(examples: Examples) -> None:
    example = examples[0]
    renamed = dataclasses.replace(example, id="other", source="elsewhere")
    drawn = tail_uniforms(example, SETTINGS)
    np.testing.assert_array_equal(drawn, tail_uniforms(renamed, SETTINGS))
    assert drawn.shape == (example.target_mask.sum(), 4)
    assert not np.array_equal(drawn, tail_uniforms(example, dataclasses.replace(SETTINGS, tail_seed=1)))
    changed = example.token_ids.copy()
    changed[0] ^= 1
    assert not np.array_equal(drawn, tail_uniforms(dataclasses.replace(example, token_ids=changed), SETTINGS))


def test_every_stratum_holds_one_uniform_of_a_row_in_random_order() -> None:
    (example,) = some_examples(30_000)
    drawn = tail_uniforms(example, SETTINGS)
    strata = np.floor(drawn * 4)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.tile(np.arange(4), (len(drawn), 1)))
    orders, counts = np.unique(strata, axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - len(drawn) / 24).max() < 5 * np.sqrt(len(drawn) / 24)


def test_every_column_of_the_uniforms_is_uniform() -> None:
    (example,) = some_examples(30_000)
    for column in tail_uniforms(example, SETTINGS).T:
        counts = np.histogram(column, bins=50, range=(0, 1))[0]
        assert np.abs(counts - len(column) / 50).max() < 5 * np.sqrt(len(column) / 50)


def test_strata_lower_the_variance_of_a_mean_over_samples_and_leave_its_expectation() -> None:
    """Of a share of 1/2, independent draws give variance 1/16 with four and 1/8 with two; strata give 0 and 1/12."""
    (example,) = some_examples(30_000)
    below = tail_uniforms(example, SETTINGS) < 0.5
    assert (below.mean(axis=1) == 0.5).all()
    first_two = below[:, :2].mean(axis=1)
    assert first_two.mean() == pytest.approx(0.5, abs=0.01)
    assert first_two.var() == pytest.approx(1 / 12, rel=0.05)
