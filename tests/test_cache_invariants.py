"""Each rule for a teacher's targets is broken once and found; valid rows raise nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.fake_cache import VOCAB, sequence, settings

from todi_offline.cache.check.invariants import faults, mass_bounds
from todi_offline.cache.format.encoding import decode_rows, encode_rows
from todi_offline.cache.format.layout import ENCODINGS
from todi_offline.cache.format.rows import TargetRows


def stored(scale: float, encoding: str, **changes: Any) -> tuple[TargetRows, Any, Any]:
    """Return rows as they come out of a cache, their labels, and the mass of their kept ids before they went in."""
    chosen = settings(encoding=encoding, **changes)
    made = sequence(5, chosen, scale=scale)
    labels = made.token_ids[np.flatnonzero(made.target_mask) + 1]
    rows = decode_rows(encode_rows(made.targets, encoding), encoding, chosen.temperatures, chosen.tail_temperature)
    return rows, labels, np.exp(made.targets.logprobs, dtype=np.float64).sum(axis=1)


def found(rows: TargetRows, labels: Any, encoding: str = "f16") -> dict[str, int]:
    counts = {what: int(wrong.sum()) for what, wrong in faults(rows, labels, encoding, VOCAB).items()}
    return {what: count for what, count in counts.items() if count}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("scale", [0.01, 3, 60, 40_000])
def test_rows_of_a_softmax_have_no_fault_be_it_flat_or_peaked(scale: float, encoding: str) -> None:
    rows, labels, mass = stored(scale, encoding)
    assert found(rows, labels, encoding) == {}
    least, most = mass_bounds(rows, encoding)
    assert ((least - 1e-6 <= mass) & (mass <= most + 1e-6)).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_that_keep_the_whole_vocabulary_have_no_fault(encoding: str) -> None:
    rows, labels, _ = stored(3, encoding, k=VOCAB, tail_samples=0)
    assert np.isneginf(rows.tail_logsumexp).all()
    assert found(rows, labels, encoding) == {}


def changed(rows: TargetRows, name: str, where: Any, value: Any) -> TargetRows:
    copy = getattr(rows, name).copy()
    copy[where] = value
    return dataclasses.replace(rows, **{name: copy})


def test_each_broken_rule_is_found_in_the_row_that_breaks_it() -> None:
    rows, labels, _ = stored(3, "f16")
    kept = int(np.flatnonzero((rows.ids == labels[:, None]).any(axis=1))[0])
    other = int(np.flatnonzero(~(rows.ids == labels[:, None]).any(axis=1))[0])
    first, last = rows.logprobs[other, 0], rows.logprobs[other, -1]
    for changes, expected in (
        (("ids", other, rows.ids[other, 0], 1), {"ids repeat"}),
        (("ids", other, VOCAB, 5), {f"ids are beyond the vocabulary of {VOCAB}"}),
        (("logprobs", other, np.nan, 2), {"log-probs are NaN or above 0"}),
        (
            ("logprobs", other, last, 0),
            {"log-probs do not fall", "the kept mass and the tail's mass do not add up to 1"},
        ),
        (("logprobs", other, first, 5), {"log-probs do not fall"}),
        (("tail_logsumexp", other, np.nan, 1), {"the tail's mass is NaN or infinite"}),
        (
            ("tail_logsumexp", other, rows.tail_logsumexp[other, 0] - 0.05, 0),
            {"the kept mass and the tail's mass do not add up to 1"},
        ),
        (
            ("label_logprob", kept, rows.label_logprob[kept] - 0.05),
            {"the label's log-prob differs from that of the same"},
        ),
        (("label_logprob", other, first), {"the label is not kept, but is more probable than a kept id"}),
        (("label_logprob", other, np.nan), {"the label's log-prob is NaN or above 0"}),
        (("tail_ids", other, rows.ids[other, 0], 1), {"a tail sample is a kept id"}),
        (("tail_ids", other, VOCAB, 1), {f"tail samples are beyond the vocabulary of {VOCAB}"}),
        (("tail_logprobs", other, np.nan, 1), {"a tail sample's log-prob is NaN or above 0"}),
        (("tail_logprobs", other, first, 1), {"a tail sample is more probable than a kept id"}),
    ):
        name, row, value, *column = changes
        faulty = found(changed(rows, name, (row, *column), value), labels)
        assert all(any(what.startswith(text) for what in faulty) for text in expected), (changes, faulty)
        assert set(faulty.values()) == {1}, (changes, faulty)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_beyond_rounding_are_found_in_every_encoding(encoding: str) -> None:
    rows, labels, _ = stored(3, encoding)
    kept = int(np.flatnonzero((rows.ids == labels[:, None]).any(axis=1))[0])
    other = int(np.flatnonzero(~(rows.ids == labels[:, None]).any(axis=1))[0])
    last = rows.logprobs[other, -1]
    for changes, expected in (
        (("tail_logsumexp", (other, 0), -9), "the kept mass and the tail's mass do not add up to 1"),
        (
            ("label_logprob", kept, rows.label_logprob[kept] - 1),
            "the label's log-prob differs from that of the same kept id",
        ),
        (("label_logprob", other, last + 0.5), "the label is not kept, but is more probable than a kept id"),
        (("tail_logprobs", (other, 1), last + 0.5), "a tail sample is more probable than a kept id"),
    ):
        faulty = found(changed(rows, *changes), labels, encoding)
        assert [what[: len(expected)] for what in faulty] == [expected], changes
        assert set(faulty.values()) == {1}


def test_a_kept_mass_above_1_is_found_with_and_without_a_tail_at_1() -> None:
    for temperatures in ((1.0, 2.0), (2.0,)):
        rows, labels, _ = stored(3, "f16", temperatures=temperatures, tail_temperature=2.0)
        inflated = dataclasses.replace(rows, logprobs=rows.logprobs / 2)
        assert "the kept mass is above 1" in found(inflated, labels)
