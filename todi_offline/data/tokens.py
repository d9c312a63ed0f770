"""What a row is before and after it is encoded, and what makes one no example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from todi_offline.errors import DataError

Row = Mapping[str, Any]


class Dropped(Exception):  # noqa: N818 -- no error of anybody's
    """The row gives no example, and is counted under this name."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence before it is cut."""

    ids: list[int]
    supervised: list[bool]
    """[token]: whether the token itself is to be predicted."""
    prompt_cut: bool = False
    splits: bool = False
    """Too long a sequence becomes several, where others lose their end."""
    lost_thoughts: bool = False
    """The chat template has left thoughts of the assistant out."""


def string_of(value: Any, where: str) -> str:
    """Return a text, or refuse what is none.

    Raises:
        DataError: it is no text, or not in valid Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} holds {value!r:.60} ({type(value).__name__}); expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character ({error}); repair its encoding") from error
    return value


def filled(text: str) -> str:
    """Return a text; a blank one drops the row."""
    if not text.strip():
        raise Dropped("num_empty")
    return text
