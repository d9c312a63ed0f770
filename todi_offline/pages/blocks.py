"""Numbers and texts in, the blocks of a page out: plain values that the scripts of the page draw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Block = dict[str, Any]
Numbers = npt.NDArray[np.floating] | Sequence[float | None]


def facts(rows: Sequence[tuple[str, str]]) -> Block:
    """Return names with their values, one a line."""
    return {"kind": "facts", "rows": rows}


def numbers(rows: Sequence[tuple[str, str]]) -> Block:
    """Return short names with numbers, several to a line."""
    return {"kind": "numbers", "rows": rows}


def series(name: str, x: Numbers, y: Numbers, low: Numbers | None = None, high: Numbers | None = None) -> Block:
    """Return a line of a chart, with a band around it where `low` and `high` say so."""
    values = {"x": x, "y": y} | ({} if low is None or high is None else {"low": low, "high": high})
    return {"name": name, **{axis: _digits(numbers) for axis, numbers in values.items()}}


def lines(
    title: str, note: str, axes: tuple[str, str], drawn: Sequence[Block], *, log_x: bool = False, from_zero: bool = True
) -> Block:
    """Return a chart of lines; `axes` names x and y."""
    return {
        "kind": "lines",
        "title": title,
        "note": note,
        "x": axes[0],
        "y": axes[1],
        "log_x": log_x,
        "from_zero": from_zero,
        "series": drawn,
    }


def histogram(title: str, note: str, axes: tuple[str, str], values: npt.NDArray[Any], num_bins: int = 30) -> Block:
    """Return a chart of how many values lie where."""
    whole = values.dtype.kind in "iu"
    low, high = float(values.min()), float(values.max())
    low = 0.0 if not whole and 0 <= low < high / 10 else low  # an axis that nearly begins at 0 begins there
    high = high if high > low else low + 1
    step = max(1.0, np.ceil((high - low + 1) / num_bins)) if whole else (high - low) / num_bins
    edges = np.arange(low, high + step * 1.001, step) if whole else np.linspace(low, high, num_bins + 1)
    counts, edges = np.histogram(values, edges)
    return {
        "kind": "histogram",
        "title": title,
        "note": note,
        "x": axes[0],
        "y": axes[1],
        "edges": _digits(edges),
        "counts": counts.tolist(),
    }


def bars(title: str, note: str, rows: Sequence[tuple[str, float, str]]) -> Block:
    """Return horizontal bars: name, length, and the value in words."""
    return {"kind": "bars", "title": title, "note": note, "rows": rows}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], links: Sequence[str | None] | None = None) -> Block:
    """Return a table that sorts by any column; `links` are addresses within the page, one a row."""
    return {"kind": "table", "columns": columns, "rows": rows, "links": links}


def texts(rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Block:
    """Return texts beside each other: for every heading, names and what each wrote."""
    return {"kind": "texts", "rows": rows}


def _digits(numbers: Numbers) -> list[float | None]:
    """Return numbers with six digits, enough for any screen; None where there is none."""
    return [None if number is None or not np.isfinite(number) else float(f"{float(number):.6g}") for number in numbers]
