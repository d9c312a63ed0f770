"""Means, standard errors and calibration, compared with explicit sums and with simulated deviations."""

import numpy as np
import pytest

from todi_offline.evaluation.tally import Tally

NAMES = ["x", "confidence", "top1_accuracy", "teacher_confidence", "cross_entropy"]


def measures(x, **others):
    x = np.asarray(x, np.float64)
    return {name: x if name == "x" else np.asarray(others.get(name, np.zeros(len(x))), np.float64) for name in NAMES}


def tallied(parts, edges=((),)):
    """Return the groups of a tally of these parts, each (sequences, keys, measures)."""
    tally = Tally(NAMES, edges)
    for sequences, keys, values in parts:
        tally.add(np.asarray(sequences), keys, values)
    return tally.groups()


def one_group(sequences, values):
    return tallied([(sequences, [np.zeros(len(sequences))], values)])[0][0]


def test_the_standard_error_equals_the_deviation_of_the_mean_for_correlated_targets():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(600):
        lengths = rng.integers(1, 30, 60)
        sequences = np.repeat(np.arange(60), lengths)
        common = rng.normal(size=60) + 0.05 * lengths  # long sequences differ from short ones
        x = common[sequences] + 0.5 * rng.normal(size=len(sequences))
        found = one_group(sequences, measures(x)).measures["x"]
        means.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.08)
    independent = np.std(x) / np.sqrt(len(x))
    assert np.mean(errors) > 2 * independent  # the formula for independent targets is too small


def test_adding_in_parts_equals_adding_at_once():
    rng = np.random.default_rng(1)
    sequences = np.repeat(np.arange(10), rng.integers(1, 9, 10))
    keys = [np.zeros(len(sequences)), rng.normal(size=len(sequences))]
    values = measures(rng.normal(size=len(sequences)), confidence=rng.random(len(sequences)))
    edges = ((), (-0.5, 0.5))
    first = sequences < 4
    parts = [
        (sequences[rows] + offset, [key[rows] for key in keys], {name: value[rows] for name, value in values.items()})
        for rows, offset in ((first, 70), (~first, 0))
    ]
    whole = tallied([(sequences, keys, values)], edges)
    for groups, expected in zip(tallied(parts, edges), whole, strict=True):
        for group, other in zip(groups, expected, strict=True):
            assert (group.low, group.high, group.num_targets) == (other.low, other.high, other.num_targets)
            for name, estimate in group.measures.items():
                assert estimate.mean == pytest.approx(other.measures[name].mean)
                assert estimate.standard_error == pytest.approx(other.measures[name].standard_error)


def test_a_key_on_an_edge_belongs_to_the_upper_group_and_empty_groups_are_left_out():
    keys = [np.array([0, 1, 3, 3, 9])]
    (groups,) = tallied([([0, 0, 1, 1, 1], keys, measures([1, 2, 3, 5, 7]))], ((1, 3, 5, 7),))
    found = [(group.low, group.high, group.num_targets, group.measures["x"].mean) for group in groups]
    assert found == [(None, 1, 1, 1), (1, 3, 1, 2), (3, 5, 2, 4), (7, None, 1, 7)]


def test_one_sequence_has_no_standard_error():
    group = one_group([0, 0], measures([1, 3]))
    assert group.measures["x"].mean == 2
    assert group.measures["x"].standard_error is None


def test_the_calibration_error_is_the_weighted_mean_over_bins():
    confidence, right, teacher = [0.95, 0.96, 0.1, 1.0], [1, 0, 0, 1], [0.9, 1.0, 0.1, 1.0]
    values = measures([0] * 4, confidence=confidence, top1_accuracy=right, teacher_confidence=teacher)
    found = one_group([0, 1, 2, 3], values).measures
    # The last of the 15 bins holds all confidences above 14/15; the second holds .1.
    assert found["calibration_error"].mean == pytest.approx((abs(0.95 + 0.96 + 1.0 - 2) + 0.1) / 4)
    assert found["calibration_error_to_teacher"].mean == pytest.approx(abs(0.95 + 0.96 + 1.0 - 2.9) / 4)


def test_perplexity_is_the_exponential_of_the_mean_cross_entropy():
    values = measures([0] * 4, cross_entropy=[1.0, 2.0, 3.0, 4.0])
    found = one_group([0, 1, 2, 3], values).measures
    assert found["perplexity"].mean == pytest.approx(np.exp(2.5))
    assert found["perplexity"].standard_error == pytest.approx(np.exp(2.5) * found["cross_entropy"].standard_error)
