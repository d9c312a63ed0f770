"""Blocks of numbers and texts in, one self-contained HTML file out.

A page's data are one block: a header in JSON, then the arrays, deflated and in base64. The scripts write them into
the document as text, never as markup. The page's Content-Security-Policy allows its own style and scripts, by their
hashes, and nothing else: no request, no image, no frame, no form.
"""

import base64
import hashlib
import html
import json
import math
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.errors import DataError
from todi_offline.pages.texts import printable

SCRIPTS = ("dom.js", "chart.js", "table.js", "texts.js", "tokens.js", "page.js")
"""The scripts in the order in which they are joined; the last one starts the page."""

_ALIGNMENT = 4  # bytes: of the widest numbers in an array
_DTYPES = ("u1", "u2", "u4", "f4")


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, and the blocks below it: see `blocks`."""

    title: str
    note: str
    blocks: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows."""

    title: str
    sections: Sequence[Section]

    def to_json(self) -> Any:
        """Return all that the page shows as JSON-able values: arrays as lists, what is no number as None."""
        return _walk(self._values(), _listed)

    def to_html(self) -> str:
        """Return the file: the same page gives the same bytes."""
        style, script = _read("page.css"), "".join(map(_read, SCRIPTS))
        policy = f"default-src 'none'; style-src '{_sum(style)}'; script-src '{_sum(script)}'; base-uri 'none'"
        return string.Template(_read("template.html")).substitute(
            policy=policy,
            title=html.escape(printable(self.title)),
            style=style,
            script=script,
            data=base64.b64encode(_deflated(_packed(self._values()))).decode(),
        )

    def write(self, file: Path) -> None:
        """Write the file.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.to_html(), encoding="utf-8", newline="\n")
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror}; choose another place for the page") from error

    def _values(self) -> dict[str, Any]:
        sections = [
            {"title": section.title, "note": section.note, "blocks": list(section.blocks)} for section in self.sections
        ]
        return {"title": self.title, "sections": sections}


def _packed(values: Any) -> bytes:
    """Return the length of a header, the header, and the arrays that it names by number, each where numbers may lie."""
    arrays: list[npt.NDArray[Any]] = []

    def numbered(array: npt.NDArray[Any]) -> Any:
        arrays.append(array)
        return {"array": len(arrays) - 1}

    header = _walk(values, numbered)
    described, start = [], 0
    for array in arrays:
        assert array.dtype.str[1:] in _DTYPES, f"{array.dtype} is not among those that the scripts read"
        described.append({"type": array.dtype.str[1:], "shape": array.shape, "start": start})
        start += _aligned(array.nbytes)
    text = json.dumps({"page": header, "arrays": described}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = text.encode()
    head += b" " * (_aligned(len(head)) - len(head))
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)
    body = b"".join(data + bytes(_aligned(len(data)) - len(data)) for data in little)
    return len(head).to_bytes(4, "little") + head + body


def _walk(value: Any, on_array: Any) -> Any:
    """Return a tree of values with its arrays replaced, its texts made printable, and None for what is no number."""
    match value:
        case np.ndarray():
            return on_array(value)
        case str():
            return printable(value)
        case Mapping():
            return {name: _walk(item, on_array) for name, item in value.items()}
        case list() | tuple():
            return [_walk(item, on_array) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _listed(array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind != "f":
        return array.tolist()
    return _walk([_shortest(row) for row in array] if array.ndim > 1 else _shortest(array), _listed)


def _shortest(row: npt.NDArray[Any]) -> list[float]:
    """Return numbers with the few digits that they are exact to."""
    return [float(f"{number:.5g}") for number in row.tolist()]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def _sum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _read(name: str) -> str:
    return files("todi_offline.pages").joinpath(name).read_text(encoding="utf-8")
