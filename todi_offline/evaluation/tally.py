"""Measures of targets come in, batch by batch; means by group, their standard errors and the calibration go out.

Memory use is constant. The targets of one sequence are not independent, so standard errors are over sequences. A mean
is a ratio of sums over sequences, sum of s_i / sum of n_i; with N sequences in the group, the standard error of this
ratio is sqrt(N / (N - 1) * sum of (s_i - mean n_i)^2) / sum of n_i.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Bound = int | float

NUM_BINS = 15
"""Number of bins of the confidence, of equal width."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over targets and its standard error over sequences; the error is None if it cannot be estimated."""

    mean: float
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The measures of one group of targets: those whose key is at least `low` and below `high`; None is no bound."""

    low: Bound | None
    high: Bound | None
    num_targets: int
    measures: dict[str, Estimate]


class Tally:
    """Sums over targets by group. `edges` has the bounds of each grouping; no bounds make one group of all targets."""

    def __init__(self, names: Sequence[str], edges: Sequence[Sequence[Bound]]) -> None:
        """Begin with sums of 0 for the measures `names`."""
        self._names = ["num_targets", *names]
        self._edges = edges
        self._starts = list(itertools.accumulate((len(bounds) + 1 for bounds in edges), initial=0))
        shape = (self._starts[-1], len(self._names))
        self._num_sequences = np.zeros(shape[0], np.int64)
        self._sums, self._squares, self._products = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._bins = np.zeros((shape[0], NUM_BINS, shape[1]))

    def add(
        self, sequences: npt.NDArray[np.int64], keys: Sequence[npt.NDArray[np.generic]], measures: Mapping[str, Values]
    ) -> None:
        """Add all targets of some sequences: each target's sequence, its key in each grouping, and its measures."""
        values = np.stack([np.ones(len(sequences)), *(measures[name] for name in self._names[1:])], axis=1)
        bins = np.minimum((measures["confidence"] * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        _, sequences = np.unique(sequences, return_inverse=True)
        by_sequence = np.zeros((sequences.max() + 1, *self._sums.shape))
        for start, bounds, key in zip(self._starts, self._edges, keys, strict=False):
            group = start + np.searchsorted(bounds, key, side="right")
            np.add.at(by_sequence, (sequences, group), values)
            np.add.at(self._bins, (group, bins), values)
        counts = by_sequence[..., :1]
        self._num_sequences += (counts[..., 0] > 0).sum(0)
        self._sums += by_sequence.sum(0)
        self._squares += (by_sequence**2).sum(0)
        self._products += (by_sequence * counts).sum(0)

    def groups(self) -> list[list[Group]]:
        """Return the groups of each grouping, without empty groups."""
        groupings = []
        for start, edges in zip(self._starts, self._edges, strict=False):
            bounds = list(zip([None, *edges], [*edges, None], strict=True))
            groupings.append(
                [
                    Group(low, high, int(self._sums[start + number, 0]), self._estimates(start + number))
                    for number, (low, high) in enumerate(bounds)
                    if self._sums[start + number, 0]
                ]
            )
        return groupings

    def _estimates(self, group: int) -> dict[str, Estimate]:
        count = self._sums[group, 0]
        means = self._sums[group] / count
        errors = self._standard_errors(group, means)
        estimates = {
            name: Estimate(float(mean), error)
            for name, mean, error in zip(self._names, means, errors, strict=True)
            if name != "num_targets"
        }
        loss = estimates["cross_entropy"]
        perplexity = math.exp(min(loss.mean, 700))
        error = None if loss.standard_error is None else perplexity * loss.standard_error
        return estimates | {
            "perplexity": Estimate(perplexity, error),
            "calibration_error": Estimate(self._calibration_error(group, "top1_accuracy")),
            "calibration_error_to_teacher": Estimate(self._calibration_error(group, "teacher_confidence")),
        }

    def _standard_errors(self, group: int, means: Values) -> list[float | None]:
        num = self._num_sequences[group]
        if num < 2:
            return [None] * len(means)
        spread = self._squares[group] - 2 * means * self._products[group] + means**2 * self._squares[group, 0]
        errors = np.sqrt(np.maximum(spread, 0) * num / (num - 1)) / self._sums[group, 0]
        return [float(error) for error in errors]

    def _calibration_error(self, group: int, truth: str) -> float:
        confidence, true = self._names.index("confidence"), self._names.index(truth)
        differences = self._bins[group, :, confidence] - self._bins[group, :, true]
        return float(np.abs(differences).sum() / self._sums[group, 0])
