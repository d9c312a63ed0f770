"""Cells of a Parquet table in, numpy arrays out; types, ranges and finiteness are checked before any cast.

A cast can silently change a number: 4294967487 becomes 191 in 32 bits, and -100 becomes True. Every error is a
ValueError that names column, target and entry; `imported_rows` adds file and row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from todi_offline.errors import DataError

Row = Mapping[str, Any]
"""A row of the table: its cells as Arrow scalars, by column, without the empty cells."""
Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Column:
    """The type that a column of the plain layout must have."""

    kind: Literal["texts", "integers", "floats", "booleans"]
    depth: int
    """The number of lists around a value."""
    axis: Literal["position", "target"] = "target"
    """The axis of the outer list."""


_COLUMNS: Mapping[str, _Column] = {
    "id": _Column("texts", 0),
    "source": _Column("texts", 0),
    "input_ids": _Column("integers", 1, "position"),
    "target_mask": _Column("booleans", 1, "position"),
    "positions": _Column("integers", 1),
    "target_ids": _Column("integers", 2),
    "target_logprobs": _Column("floats", 2),
    "tail_logsumexp": _Column("floats", 2),
    "label_logprob": _Column("floats", 1),
    "tail_ids": _Column("integers", 2),
    "tail_logprobs": _Column("floats", 2),
    "log_partition": _Column("floats", 1),
}
COLUMN_NAMES = tuple(_COLUMNS)


def require_types(schema: pa.Schema, where: str) -> None:
    """Refuse a table that has a column of a wrong Arrow type.

    Raises:
        DataError: a column has a wrong type; names the file, the column and both types.
    """
    for name, column in _COLUMNS.items():
        if (found := schema.names.count(name)) > 1:
            raise DataError(f"{where} has {found} columns named {name}; keep one of them")
        if found and not _is_of(schema.field(name).type, column.depth, column.kind):
            lists = "lists of " * column.depth
            integers = " (or of 0 and 1)" if column.kind == "booleans" else ""
            raise DataError(
                f"{where}, column {name}: its type is {schema.field(name).type}, expected {lists}{column.kind}"
                f"{integers}; check the values, and cast the column where the table is made"
            )


def _is_of(kind: pa.DataType, depth: int, wanted: str) -> bool:
    if pa.types.is_null(kind):  # the column is empty, which the check of its rows reports
        return True
    if depth:
        is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return any(is_one(kind) for is_one in is_list) and _is_of(kind.value_type, depth - 1, wanted)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_integer: bool = pa.types.is_integer(kind)
    fits: dict[str, bool] = {
        "texts": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "integers": is_integer,
        "floats": pa.types.is_floating(kind),
        "booleans": pa.types.is_boolean(kind) or is_integer,
    }
    return fits[wanted]


@dataclass(frozen=True, slots=True)
class Cell:
    """The values of a cell, end to end, in their original type."""

    name: str
    values: npt.NDArray[Any]
    lengths: Integers
    """Lengths of the inner lists, [target]; of a cell with one list, the length of that list, [1]."""

    def ids(self, vocab_size: int) -> Integers:
        """Return the values as ids of a vocabulary."""
        is_wrong = (self.values < 0) | (self.values >= vocab_size)
        self._refuse(is_wrong, f"expected ids of the vocabulary, 0 to {vocab_size - 1}")
        return self.values.astype(np.int64)

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return the values as booleans."""
        if self.values.dtype != np.bool_:
            self._refuse((self.values != 0) & (self.values != 1), "expected true or false, or 1 or 0")
        return self.values.astype(np.bool_)

    def logprobs(self, most: float = 0.0) -> Numbers:
        """Return the values as natural logs of masses: at most `most`, or -inf for 0."""
        values = self.values.astype(np.float64)
        is_possible = (values <= most) & (np.isneginf(values) | (values >= -_LARGEST_FLOAT32))
        self._refuse(~is_possible, f"expected a natural log of at most {most:.6g}, or -inf")
        return values

    def finite(self) -> Numbers:
        """Return the values as finite numbers of float32."""
        values = self.values.astype(np.float64)
        self._refuse(~(np.abs(values) <= _LARGEST_FLOAT32), "expected a finite number of float32")
        return values

    def rows(self, values: npt.NDArray[Any], num_targets: int, columns: int) -> npt.NDArray[Any]:
        """Return the checked values of inner lists that all have the same length, [target, column]."""
        self.require_targets(num_targets)
        if (wrong := self.lengths != columns).any():
            target = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"column {self.name}: target {target} has {self.lengths[target]} entries; expected {columns}"
            )
        return values.reshape(num_targets, columns)

    def require_targets(self, num_targets: int) -> None:
        """Refuse a cell that has values for more or fewer targets than the row supervises."""
        found = len(self.lengths) if _COLUMNS[self.name].depth == 2 else len(self.values)
        if found != num_targets:
            raise ValueError(
                f"column {self.name}: the cell has {found} targets, but the row supervises {num_targets} positions"
            )

    def _refuse(self, is_wrong: npt.NDArray[np.bool_], expected: str) -> None:
        if is_wrong.any():
            index = int(np.flatnonzero(is_wrong)[0])
            raise ValueError(f"column {self.name}: {self._place(index)} is {self.values[index]}; {expected}")

    def _place(self, index: int) -> str:
        column = _COLUMNS[self.name]
        if column.depth == 1:
            return f"{column.axis} {index}"
        ends = np.cumsum(self.lengths)
        target = int(np.searchsorted(ends, index, side="right"))
        return f"target {target}, entry {index - int(ends[target] - self.lengths[target])}"


def read_cell(row: Row, name: str) -> Cell:
    """Return a cell of a row whose column has passed `require_types`.

    Raises:
        ValueError: the cell is empty, or holds an empty list or value.
    """
    if name not in row:
        raise ValueError(f"column {name}: the cell is empty")
    values = row[name].values
    lengths = np.array([len(values)], np.int64)
    if _COLUMNS[name].depth == 2:
        _require_full(name, values, "list of target")
        lengths = np.asarray(pc.list_value_length(values), np.int64) if len(values) else lengths[:0]
        values = values.flatten() if len(values) else values
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    _require_full(name, values, "value")
    return Cell(name, values.to_numpy(zero_copy_only=False), lengths)


def read_text(row: Row, name: str) -> str | None:
    """Return a text cell, or None where it is empty."""
    return str(row[name].as_py()) if name in row else None


def _require_full(name: str, values: pa.Array, what: str) -> None:
    if values.null_count:
        index = int(np.flatnonzero(np.asarray(values.is_null()))[0])
        raise ValueError(f"column {name}: the {what} {index} is empty; fill it, or leave the row out")
