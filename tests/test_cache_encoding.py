"""Log-probs through their stored encodings, within the error bounds that the module states."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from todi_offline.cache.format.encoding import (
    bounds,
    decode_logprobs,
    decode_rows,
    encode_logprobs,
    encode_rows,
    logprob_bounds,
)
from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import TargetsError

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


@given(FALLING)
@settings(max_examples=500, deadline=None)
def test_root8_is_off_by_a_256th_in_the_fourth_root_and_loses_little_divergence(logprobs: np.ndarray) -> None:
    logprobs = logprobs - np.maximum(np.logaddexp.reduce(logprobs, axis=1, keepdims=True), 0)  # mass of 1 at most
    stored = encode_logprobs(logprobs, "root8")
    assert stored.dtype == np.uint8
    back = decode_logprobs(stored, "root8")
    assert (np.diff(back, axis=1) <= 0).all()
    assert (abs(np.exp(back / 4) - np.exp(logprobs / 4)) <= 1 / 256 + 1e-7).all()
    for least, most in ((0, 1 / 64), (np.log(0.01), 1 / 19), (np.log(1e-4), 1 / 6)):
        likely = logprobs >= least - 1e-6
        assert (abs(back - logprobs)[likely] <= most + 1e-5).all()
    p, q = np.exp(logprobs.astype(np.float64)), np.exp(back.astype(np.float64))
    lost = np.where(p > 0, p * (np.maximum(logprobs, -100) - back), 0) - p + q
    assert (lost.sum(axis=1) <= 1.3e-4 * np.sqrt(p).sum(axis=1) + 1e-8 * p.shape[1]).all()


def logits_in_bf16(seed: int, scale: float, k: int = 20) -> TargetRows:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(0, scale, (50, 300)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    logits[:, :3] = [-np.inf, -0.0, 0.0]
    log_partition = np.logaddexp.reduce(logits, axis=1)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.uint32)
    logprobs = np.take_along_axis(logits, ids, axis=1) - log_partition[:, None]
    return TargetRows(ids, logprobs, -logits[:, 4:5], logprobs[:, 0], (1.0,), log_partition=log_partition)


@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("scale", [0.01, 5, 100])
def test_bf16_logits_lose_nothing_but_the_rounding_of_float32_and_keep_the_order(scale: float, k: int) -> None:
    rows = logits_in_bf16(3, scale, k)
    stored = encode_rows(rows, "bf16_logit")
    assert stored["topk_logprobs"].dtype == np.uint16
    assert (np.diff(stored["topk_ids"].astype(int), axis=1) > 0).all()
    back = decode_rows(stored, "bf16_logit", (1.0,), 1.0)
    lower, upper = bounds(back, "bf16_logit")["logprobs"]
    assert ((lower <= rows.logprobs) & (rows.logprobs <= upper)).all()
    assert (np.diff(back.logprobs, axis=1) <= 0).all()
    exact = (
        abs(rows.logprobs + rows.log_partition[:, None]) > 1e-3
    )  # nearer to 0 bfloat16 is finer than float32 is here
    assert (back.ids == rows.ids)[exact].all()
    again = encode_rows(back, "bf16_logit")
    assert all((again[name] == values).all() for name, values in stored.items())


def test_logits_that_are_no_bf16_or_not_known_are_refused() -> None:
    rows = logits_in_bf16(3, 5)
    with pytest.raises(TargetsError, match="lack the teacher's log-partition"):
        encode_rows(dataclasses.replace(rows, log_partition=None), "bf16_logit")
    rows.logprobs[7, 2] += 0.001
    with pytest.raises(
        TargetsError,
        match=r"the teacher's logit .* is not a bfloat16 number.* load the teacher and its head in bfloat16",
    ):
        encode_rows(rows, "bf16_logit")


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=2, max_side=40),
        elements=st.one_of(st.floats(-3000, 22, width=32), st.floats(-40, 0, width=32), st.just(-np.inf)),
    ),
)
@settings(max_examples=200, deadline=None)
def test_root8_keeps_sums_labels_and_samples_to_half_a_step(nats: np.ndarray) -> None:
    column = nats.reshape(len(nats), -1)
    ids = np.zeros_like(column, np.uint32)
    temperatures = tuple(range(1, column.shape[1] + 1))
    rows = TargetRows(ids, -abs(column), column, column[:, 0], temperatures, 1.0, ids, np.minimum(column, 0))
    back = decode_rows(encode_rows(rows, "root8"), "root8", temperatures, 1.0)
    for name, error, least in (
        ("tail_logsumexp", 1 / 64, -32767 / 32),
        ("label_logprob", 1 / 32, -32767 / 16),
        ("tail_logprobs", 1 / 8, -127 / 4),
    ):
        truth, decoded = getattr(rows, name), getattr(back, name)
        assert (np.isneginf(truth) == np.isneginf(decoded)).all()
        assert (abs(np.maximum(truth, least) - decoded)[np.isfinite(truth)] <= error).all()
        lower, upper = bounds(back, "root8")[name]
        assert ((lower <= truth) & (truth <= upper)).all()


@pytest.mark.parametrize("k", [1, 7, 64])
def test_root8_gives_rows_back_by_falling_probability_and_rising_id(k: int) -> None:
    rng = np.random.default_rng(k)
    logits = rng.normal(0, 2, (200, 300))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    kept = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    rows = TargetRows(ids.astype(np.uint32), kept, kept[:, :1], kept[:, 0], (1.0,))
    stored = encode_rows(rows, "root8")
    assert (np.diff(stored["topk_ids"].astype(int), axis=1) > 0).all()
    back = decode_rows(stored, "root8", (1.0,), 1.0)
    expected = decode_logprobs(encode_logprobs(kept, "root8"), "root8")
    for row in range(len(ids)):
        pairs = sorted(zip(-expected[row], ids[row].tolist(), strict=True))
        assert back.ids[row].tolist() == [number for _, number in pairs]
        assert back.logprobs[row].tolist() == [-value for value, _ in pairs]
    again = encode_rows(back, "root8")
    assert all((again[name] == values).all() for name, values in stored.items())


@pytest.mark.parametrize("encoding", ["f16", "q8", "root8"])
@given(st.one_of(FALLING, FALLING.map(lambda logprobs: logprobs * np.float32(2000))))
@settings(max_examples=200, deadline=None)
def test_the_bounds_of_stored_values_contain_the_original(encoding: str, logprobs: np.ndarray) -> None:
    lower, upper = logprob_bounds(decode_logprobs(encode_logprobs(logprobs, encoding), encoding), encoding)
    assert ((lower - 1e-6 <= logprobs) & (logprobs <= upper + 1e-6)).all()
    if encoding != "root8":
        tight = np.isfinite(lower)
        assert (abs(upper - lower)[tight] <= 1 / 16 + 1e-6 + 2.0**-9 * abs(upper[tight])).all()


@pytest.mark.parametrize("encoding", ["f16", "q8", "root8"])
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


@pytest.mark.parametrize("encoding", ["f16", "q8", "bf16_logit", "root8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["logprobs", "tail_logsumexp", "label_logprob"])
def test_a_number_that_is_none_is_refused_before_an_encoding_makes_one_of_it(
    encoding: str, value: float, name: str
) -> None:
    rows = logits_in_bf16(3, 5)
    damaged = getattr(rows, name).copy()
    damaged[7] = value
    rows = dataclasses.replace(rows, **{name: damaged})
    with pytest.raises(TargetsError, match=f"{name} of target 7 holds NaN"):
        encode_rows(rows, encoding)


def row_arrays() -> dict[str, Any]:
    """The fields of two valid rows of three entries, two temperatures and one sample."""
    numbers = np.zeros((2, 6), np.float32)
    return {
        "ids": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "logprobs": numbers[:, :3],
        "tail_logsumexp": numbers[:, :2],
        "label_logprob": numbers[:, 0],
        "temperatures": (1.0, 2.0),
        "tail_ids": np.ones((2, 1), np.uint32),
        "tail_logprobs": numbers[:, :1],
        "log_partition": numbers[:, 0],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", np.zeros((2, 3), np.int64)),
        ("ids", np.zeros(2, np.uint32)),
        ("logprobs", np.zeros((2, 4), np.float32)),
        ("logprobs", np.zeros((2, 3), np.int32)),
        ("tail_logsumexp", np.zeros((2, 3), np.float32)),
        ("label_logprob", np.zeros(3, np.float32)),
        ("label_logprob", np.zeros((2, 1), np.float32)),
        ("tail_ids", None),
        ("tail_ids", np.zeros((2, 2), np.uint32)),
        ("tail_ids", np.zeros((2, 1), np.float32)),
        ("tail_logprobs", None),
        ("tail_logprobs", np.zeros((1, 1), np.float32)),
        ("log_partition", np.zeros((2, 1), np.float32)),
    ],
)
def test_rows_that_do_not_fit_together_cannot_be_built(name: str, value: Any) -> None:
    assert len(TargetRows(**row_arrays())) == 2
    with pytest.raises(TargetsError):
        TargetRows(**(row_arrays() | {name: value}))
