"""A row in, the row with a stand-in for its answer, and the references that the answer is compared with, out."""

from collections.abc import Mapping
from typing import Any

from todi_offline.data.forms import form_of
from todi_offline.data.tokens import Row
from todi_offline.errors import DataError

_STAND_IN = "-"
"""A prompt does not depend on the answer that follows it."""


def without_answer(row: Row) -> tuple[Row, tuple[str, ...]]:
    """Return a row as prompt and stand-in, and its references; of a conversation the last message is the answer.

    Raises:
        DataError: it has no answer.
    """
    form = form_of(row)
    if form is None or form.answer is None:
        shown = ", ".join(map(str, row))
        raise DataError(f"it has the columns {shown}; expected messages, completion, output or response")
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
        # Thoughts and calls belong to the answer: with them another prompt would be rendered.
        stand_in: Any = [*before, {"role": last.get("role"), "content": _STAND_IN}]
        texts = [last.get("content")]
    else:
        stand_in, texts = _STAND_IN, _list_of(row, column) if isinstance(answer, list) else [answer]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"column {column!r} holds {texts!r:.60}; expected a text, or a list of texts")
    return {**row, column: stand_in}, tuple(texts)


def _require_message(message: Any) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"its last message is {message!r:.60}; expected an object with role and content")


def _list_of(row: Row, column: str) -> list[Any]:
    values = row[column]
    if not isinstance(values, list) or not values:
        raise DataError(f"column {column!r} holds {values!r:.60}; expected a list that is not empty")
    return values
