"""Examples, settings and rows in, plain values that travel between the processes of an engine out; and back.

A message is made of text, numbers, bytes, lists and dicts. Between processes vLLM turns numpy arrays into bare tuples,
and an object that cannot be serialised leaves the driver waiting for ever.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example

KEY = "todi_offline"
"""The name of an example's message among the extra arguments of a request."""

Message = dict[str, Any]


def settings_message(settings: CacheSettings, vocab_size: int) -> str:
    """Return the settings of a cache and the number of ids that its tokenizer knows, as JSON."""
    return json.dumps({"settings": dataclasses.asdict(settings), "vocab_size": vocab_size})


def parse_settings(message: str) -> tuple[CacheSettings, int]:
    """Return what `settings_message` was given."""
    sent = json.loads(message)
    values: dict[str, Any] = sent["settings"]
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return CacheSettings(**(values | tuples)), sent["vocab_size"]


def example_message(number: int, example: Example) -> Message:
    """Return an example, and the number by which its targets are asked for."""
    return {
        "number": number,
        "id": example.id,
        "tokens": example.token_ids.astype("<u4").tobytes(),
        "mask": np.packbits(example.target_mask).tobytes(),
    }


def parse_example(message: Message) -> tuple[int, Example]:
    """Return what `example_message` was given, but for the source, which no target depends on."""
    tokens = np.frombuffer(message["tokens"], "<u4").astype(np.uint32)
    mask = np.unpackbits(np.frombuffer(message["mask"], np.uint8), count=len(tokens)).astype(np.bool_)
    return message["number"], Example(message["id"], "", tokens, mask)


def rows_message(rows: TargetRows) -> Message:
    """Return the arrays of rows of targets, each as its dtype, its shape and its bytes."""
    return {name: [array.dtype.str, list(array.shape), array.tobytes()] for name, array in rows.arrays().items()}


def parse_rows(message: Message, settings: CacheSettings) -> TargetRows:
    """Return the rows of targets that `rows_message` was given, which were made with these settings."""
    arrays: dict[str, Any] = {
        name: np.frombuffer(data, dtype).reshape(shape).copy() for name, (dtype, shape, data) in message.items()
    }
    return TargetRows(temperatures=settings.temperatures, tail_temperature=settings.tail_temperature, **arrays)
