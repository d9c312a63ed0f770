"""Messages between the processes of an engine: only plain values, and all of them arrive."""

from typing import Any

import numpy as np
import pytest
from support.made_examples import some_examples

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.teacher.in_vllm.messages import (
    example_message,
    parse_example,
    parse_rows,
    parse_settings,
    rows_message,
    settings_message,
)

SETTINGS = CacheSettings(k=3, tail_samples=2, temperatures=(1.0, 2.0, 4.0), tail_temperature=2.0, encoding="bf16_logit")


def assert_plain(value: Any) -> None:
    """Of types that every serialiser knows."""
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)
        return
    assert type(value) in (str, int, bytes)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 300])
def test_an_example_survives_its_message(length: int) -> None:
    (example,) = some_examples(length)
    message = example_message(12, example)
    assert_plain(message)
    number, parsed = parse_example(message)
    assert (number, parsed.id) == (12, example.id)
    np.testing.assert_array_equal(parsed.token_ids, example.token_ids)
    np.testing.assert_array_equal(parsed.target_mask, example.target_mask)


def test_settings_survive_their_message() -> None:
    assert parse_settings(settings_message(SETTINGS, 512)) == (SETTINGS, 512)


@pytest.mark.parametrize("has_all", [True, False], ids=["all fields", "no samples"])
def test_rows_of_targets_survive_their_message(has_all: bool) -> None:
    generator = np.random.default_rng(0)

    def floats(*shape: int) -> Any:
        return generator.random(shape, np.float32)

    rows = TargetRows(
        ids=generator.integers(0, 9, (4, 3), np.uint32),
        logprobs=floats(4, 3),
        tail_logsumexp=floats(4, 3),
        label_logprob=floats(4),
        temperatures=SETTINGS.temperatures,
        tail_temperature=SETTINGS.tail_temperature,
        tail_ids=generator.integers(0, 9, (4, 2), np.uint32) if has_all else None,
        tail_logprobs=floats(4, 2) if has_all else None,
        log_partition=floats(4) if has_all else None,
    )
    message = rows_message(rows)
    assert_plain(message)
    parsed = parse_rows(message, SETTINGS)
    assert parsed.temperatures == SETTINGS.temperatures
    assert parsed.tail_temperature == 2.0
    assert parsed.arrays().keys() == rows.arrays().keys()
    for name, array in rows.arrays().items():
        found = parsed.arrays()[name]
        assert found.dtype == array.dtype
        assert found.flags.writeable
        np.testing.assert_array_equal(found, array)
