"""Log-probs through their stored forms, within the bounds that the module states."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from todi_offline.cache.encoding import TargetRows, decode_logprobs, encode_logprobs, logprob_bounds

FALLING = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.one_of(st.floats(-80, 0, width=32), st.just(-np.inf), st.just(0.0)),
).map(lambda values: -np.sort(-values, axis=1))


@given(FALLING)
@settings(max_examples=200, deadline=None)
def test_f16_is_off_by_one_part_in_2048_at_most(logprobs: np.ndarray) -> None:
    stored = encode_logprobs(logprobs, "f16")
    assert stored.dtype == np.float16
    back = decode_logprobs(stored, "f16")
    finite = np.isfinite(logprobs)
    assert (back[~finite] == -np.inf).all()
    assert (abs(back[finite] - logprobs[finite]) <= 2.0**-11 * abs(logprobs[finite]) + 2.0**-25).all()


@given(FALLING)
@settings(max_examples=200, deadline=None)
def test_q8_is_off_by_a_32nd_of_a_nat_but_past_gaps_of_16_nats(logprobs: np.ndarray) -> None:
    stored = encode_logprobs(logprobs, "q8")
    assert stored.dtype == np.uint8
    back = decode_logprobs(stored, "q8")
    assert (np.diff(back, axis=1) <= 0).all()
    before = np.concatenate([np.zeros((len(back), 1), np.float32), back[:, :-1]], axis=1)
    gap = stored == 255
    error = abs(back - np.maximum(logprobs, -1e6))
    assert (error[~gap] <= 1 / 32 + 1e-5).all()
    assert (back[gap] <= before[gap] - 15.9).all()
    assert (logprobs[gap] <= before[gap] - 15.9 + 1 / 32).all()


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@given(st.one_of(FALLING, FALLING.map(lambda logprobs: logprobs * np.float32(2000))))
@settings(max_examples=200, deadline=None)
def test_the_bounds_of_what_is_stored_hold_the_truth(encoding: str, logprobs: np.ndarray) -> None:
    lower, upper = logprob_bounds(decode_logprobs(encode_logprobs(logprobs, encoding), encoding), encoding)
    assert ((lower - 1e-6 <= logprobs) & (logprobs <= upper + 1e-6)).all()
    tight = np.isfinite(lower)
    assert (abs(upper - lower)[tight] <= np.maximum(2.0**-9 * abs(upper[tight]), 1 / 16)).all()


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_the_first_columns_of_a_row_do_not_depend_on_the_later_ones(encoding: str) -> None:
    logprobs = -np.sort(np.random.default_rng(0).gamma(2, 2, (50, 32)).astype(np.float32), axis=1)
    wide = decode_logprobs(encode_logprobs(logprobs, encoding), encoding)
    narrow = decode_logprobs(encode_logprobs(logprobs[:, :8], encoding), encoding)
    assert (wide[:, :8] == narrow).all()


def test_rows_are_cut_and_joined_field_by_field() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    rows = TargetRows(values.astype(np.uint32), -values, -values, -values[:, 0], (1.0, 2.0))
    joined = TargetRows.concatenate([rows[:2], rows[2:]])
    assert len(joined) == 6
    assert joined.tail_ids is None
    assert all((joined.arrays()[name] == array).all() for name, array in rows.arrays().items())
