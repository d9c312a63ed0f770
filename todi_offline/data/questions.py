"""A row comes in; the row with a stand-in for its answer goes out, and the references that the answer gave."""

from collections.abc import Mapping
from typing import Any

from todi_offline.data.forms import form_of
from todi_offline.data.tokens import Row
from todi_offline.errors import DataError

_STAND_IN = "-"
"""Stands in for the answer when a prompt is encoded: the prompt does not depend on the answer."""


def without_answer(row: Row) -> tuple[Row, tuple[str, ...]]:
    """Return a row with a stand-in for its answer, and the references; the last message of `messages` is the answer.

    Raises:
        DataError: the row has no answer.
    """
    form = form_of(row)
    if form is None or form.answer is None:
        shown = ", ".join(map(str, row))
        raise DataError(f"the row has the columns {shown}; expected messages, completion, output or response")
    if form.answer == "messages":
        *before, last = _list_of(row, "messages")
        _require_message(last)
        row = {name: value for name, value in row.items() if name != "messages"}
        row, column = row | {"prompt": before, "completion": [last]}, "completion"
    else:
        column = form.answer
    answer = row[column]
    if isinstance(answer, list) and answer and not isinstance(answer[0], str):
        *before, last = answer
        _require_message(last)
        # Without thoughts and tool calls: they belong to the answer, and some templates would change the prompt.
        stand_in: Any = [*before, {"role": last.get("role"), "content": _STAND_IN}]
        texts = [last.get("content")]
    else:
        stand_in, texts = _STAND_IN, _list_of(row, column) if isinstance(answer, list) else [answer]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"column {column!r} holds {texts!r:.60}; expected a text, or a list of texts")
    return {**row, column: stand_in}, tuple(texts)


def _require_message(message: Any) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"the last message is {message!r:.60}; expected an object with role and content")


def _list_of(row: Row, column: str) -> list[Any]:
    values = row[column]
    if not isinstance(values, list) or not values:
        raise DataError(f"column {column!r} holds {values!r:.60}; expected a list that is not empty")
    return values
