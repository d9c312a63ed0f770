"""The types on both sides of encoding: a `Row` comes in; `Tokens` go out, or the row is `Dropped`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from todi_offline.errors import DataError

Row = Mapping[str, Any]


class Dropped(Exception):  # noqa: N818 -- it is not an error
    """The row gives no example; the argument names the count in `DataReport` that it adds to."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence before it is cut."""

    ids: list[int]
    supervised: list[bool]
    """[token]: True where the student learns to predict this token."""
    prompt_cut: bool = False
    splits: bool = False
    """Split a sequence that is too long into several examples; otherwise it loses its end."""
    lost_thoughts: bool = False
    """The chat template left out thoughts of the assistant."""


def string_of(value: Any, where: str) -> str:
    """Return a value that must be a text.

    Raises:
        DataError: the value is not a text, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} holds {value!r:.60} ({type(value).__name__}); expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not valid Unicode ({error}); repair its encoding") from error
    return value


def drop_if_blank(text: str) -> str:
    """Return a text; drop the row if the text is blank."""
    if not text.strip():
        raise Dropped("num_empty")
    return text
