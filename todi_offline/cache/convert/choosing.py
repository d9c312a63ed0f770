"""A cache and conditions in, the sequences that meet all conditions out."""

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.errors import CacheMismatchError, ConfigError, DataError

Selection = npt.NDArray[np.bool_]
"""[sequence]: True where a sequence is chosen."""

_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.And: np.logical_and,
    ast.Or: np.logical_or,
    ast.Not: np.logical_not,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COLUMNS = ("id", "source", "num_tokens", "num_targets", "teacher_nll", "topk_mass")


def choose(
    cache: Cache, ids: Path | None, keys: Path | None, like: str | None, expression: str | None, limit: int | None
) -> tuple[Selection, dict[str, Any]]:
    """Return the sequences that meet all conditions, and the conditions for the manifest, without any path.

    `ids` and `keys` name files with one entry a line; `like` names another cache; `expression` is one for `where`;
    `limit` keeps the first sequences that meet the other conditions.

    Raises:
        ConfigError, DataError: a condition or a file cannot be read.
        CacheMismatchError: the cache lacks an id.
    """
    chosen, recipe = np.ones(len(cache), np.bool_), dict[str, Any]()
    if ids is not None:
        chosen &= with_ids(cache, names := _lines(ids))
        recipe["ids"] = len(names)
    if keys is not None:
        chosen &= with_content(cache, found := _keys(keys))
        recipe["keys"] = len(found)
    if like is not None:
        chosen &= with_content(cache, open_cache(like).content_keys)
        recipe["like"] = True
    if expression is not None:
        chosen &= where(cache, expression)
        recipe["where"] = expression
    if limit is not None:
        chosen &= np.cumsum(chosen) <= limit
        recipe["limit"] = limit
    return chosen, recipe


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; name a text file with one entry a line") from error


def _keys(path: Path) -> ContentKeys:
    try:
        return ContentKeys.from_hex(_lines(path))
    except ValueError as error:
        raise DataError(f"{path} is not a file of content keys: {error}; `todi keys` makes such a file") from error


def with_ids(cache: Cache, ids: Iterable[str]) -> Selection:
    """Choose sequences by their ids.

    Raises:
        CacheMismatchError: the cache lacks some ids; names the first few.
    """
    wanted = set(ids)
    found = cache.sequences["id"].to_pylist()
    if missing := sorted(wanted - set(found)):
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CacheMismatchError(f"{cache.root} has no sequence {shown}; `todi-cache inspect` shows some of its ids")
    return np.array([name in wanted for name in found])


def with_content(cache: Cache, keys: ContentKeys) -> Selection:
    """Choose sequences by their content keys."""
    return keys.find(cache.content_keys) >= 0


def where(cache: Cache, expression: str) -> Selection:
    """Choose sequences by an expression over the columns of the sequence table.

    Columns are id, source, num_tokens, num_targets, teacher_nll and topk_mass; beside them stand numbers, texts,
    comparisons, `and`, `or`, `not`, arithmetic and parentheses: `teacher_nll < 2.5 and topk_mass > 0.9`.

    Raises:
        ConfigError: the expression has another form, or yields no condition.
    """
    try:
        tree = ast.parse(expression, mode="eval")
        chosen = np.asarray(_evaluate(tree.body, cache.sequences))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"cannot select by {expression!r}: {why}; expected comparisons of {', '.join(_COLUMNS)}, "
            "e.g. teacher_nll < 2.5 and topk_mass > 0.9"
        ) from error
    if chosen.dtype != np.bool_ or chosen.shape != (len(cache),):
        raise ConfigError(f"{expression!r} is not a condition; compare a column with a value, e.g. teacher_nll < 2.5")
    return chosen


def _evaluate(node: ast.AST, table: pa.Table) -> Any:
    """Evaluate the tree of an expression over the columns of a table; refuse every node that is not listed here."""
    match node:
        case ast.Name(id=name) if name in _COLUMNS:
            return table[name].to_numpy()
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=op, operand=operand):
            return _operator(op)(_evaluate(operand, table))
        case ast.BinOp(left=left, op=op, right=right):
            return _operator(op)(_evaluate(left, table), _evaluate(right, table))
        case ast.BoolOp(op=op, values=values):
            return _folded(_operator(op), [_evaluate(value, table) for value in values])
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_evaluate(side, table) for side in (left, *others)]
            pairs = zip(ops, sides, sides[1:], strict=False)
            return _folded(np.logical_and, [_operator(op)(a, b) for op, a, b in pairs])
    raise ValueError(f"{ast.unparse(node)!r} is not understood")


def _operator(op: ast.AST) -> Callable[..., Any]:
    if type(op) not in _OPERATORS:
        raise ValueError(f"the operator {type(op).__name__} is not supported")
    return _OPERATORS[type(op)]


def _folded(operation: Callable[..., Any], values: list[Any]) -> Any:
    folded = values[0]
    for value in values[1:]:
        folded = operation(folded, value)
    return folded
