"""A cache in, a smaller one out: some of its sequences, with less of each, or stored in another way."""

import ast
import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.fingerprint import Keys, content_key, hash_bytes, hash_json
from todi_offline.cache.format.layout import TOKENIZER_KEY, CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.plan import ShardPlan, plan_shards
from todi_offline.cache.reader import Cache
from todi_offline.cache.writer import CacheWriter, SequenceRows
from todi_offline.errors import CacheMismatchError, ConfigError

Selection = npt.NDArray[np.bool_]
"""[sequence]: which are chosen."""
Progress = Callable[[int, int], None]
"""Called with the shards written so far and all that are to be."""

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


def subset_cache(
    cache: Cache,
    out: str,
    chosen: Selection,
    criteria: Mapping[str, Any],
    progress: Progress = lambda *_: None,
    **settings: Any,
) -> Manifest:
    """Write the chosen sequences of a cache to another, in their order; return its manifest.

    `settings` are fields of `CacheSettings` that differ from the cache's: fewer entries, temperatures or samples,
    another encoding, codec or shard size. Rows come out as they went in where the encoding stays; to another encoding
    they go with the rounding of both. `criteria` say in the manifest what was chosen. The same call again goes on.

    Raises:
        CacheMismatchError: nothing is chosen, or the cache holds less than is asked for.
        TargetsError: the encoding needs what the cache has not.
        CacheError: `out` cannot be written or holds something else.
    """
    if not chosen.any():
        raise CacheMismatchError(f"of the {len(cache):,} sequences of {cache.root} none is chosen; ask for others")
    asked = dataclasses.replace(cache.manifest.settings, **settings)
    sample = narrow(cache[0].targets[:1], asked, b"")
    encode_rows(sample, asked.encoding)  # before anything is written: it may ask for what the cache has not
    indices = np.flatnonzero(chosen)
    plan = plan_shards(cache.num_tokens[indices].tolist(), asked.shard_tokens)
    part = Part(
        recipe={"subset_of": hash_json([part.content for part in cache.manifest.parts]), **criteria},
        content=hash_bytes(cache.content_keys[indices].tolist()),
        num_sequences=len(indices),
        num_shards=len(plan),
        versions=cache.manifest.parts[-1].versions,
    )
    manifest = dataclasses.replace(cache.manifest, settings=asked, parts=(part,))
    has_tokenizer = cache.store.size(TOKENIZER_KEY) is not None
    with CacheWriter(out, manifest, cache.store.read(TOKENIZER_KEY).decode() if has_tokenizer else None) as writer:
        missing = writer.missing_shards()
        for done, number in enumerate(missing):
            progress(done, len(missing))
            writer.write_shard(number, _rows(cache, indices, plan[number], asked))
        if not writer.sealed:
            writer.seal()
        progress(len(missing), len(missing))
    return manifest


def with_ids(cache: Cache, ids: Iterable[str]) -> Selection:
    """Choose sequences by their ids.

    Raises:
        CacheMismatchError: an id is not in the cache; names the first few.
    """
    wanted = set(ids)
    found = cache.sequences["id"].to_pylist()
    if missing := sorted(wanted - set(found)):
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CacheMismatchError(f"{cache.root} has no sequence {shown}; `todi-cache inspect` shows some of its ids")
    return np.array([name in wanted for name in found])


def with_content(cache: Cache, keys: Keys) -> Selection:
    """Choose sequences by their content keys."""
    return np.isin(cache.content_keys, keys)


def where(cache: Cache, expression: str) -> Selection:
    """Choose sequences by an expression over the columns of the sequence table.

    Columns are id, source, num_tokens, num_targets, teacher_nll and topk_mass; beside them stand numbers, texts,
    comparisons, `and`, `or`, `not`, arithmetic and parentheses: `teacher_nll < 2.5 and topk_mass > 0.9`.

    Raises:
        ConfigError: the expression holds something else, or does not choose.
    """
    try:
        tree = ast.parse(expression, mode="eval")
        chosen = np.asarray(_evaluate(tree.body, cache.sequences))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"cannot choose by {expression!r}: {why}; expected comparisons of {', '.join(_COLUMNS)}, "
            "e.g. teacher_nll < 2.5 and topk_mass > 0.9"
        ) from error
    if chosen.dtype != np.bool_ or chosen.shape != (len(cache),):
        raise ConfigError(f"{expression!r} does not choose; compare a column with something, e.g. teacher_nll < 2.5")
    return chosen


def _rows(cache: Cache, indices: npt.NDArray[np.int64], plan: ShardPlan, settings: CacheSettings) -> list[SequenceRows]:
    rows = []
    for index in indices[plan.start : plan.stop].tolist():
        sequence = cache[index]
        key = content_key(sequence.token_ids, sequence.target_mask)
        name, source = (cache.sequences[column][index].as_py() for column in ("id", "source"))
        targets = narrow(sequence.targets, settings, key)
        rows.append(SequenceRows(name, source, sequence.token_ids, sequence.target_mask, targets))
    return rows


def _evaluate(node: ast.AST, table: pa.Table) -> Any:
    """Evaluate an expression's tree over a table's columns; whatever is not listed here is refused."""
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
        raise ValueError(f"{type(op).__name__} is no operator of these expressions")
    return _OPERATORS[type(op)]


def _folded(operation: Callable[..., Any], values: list[Any]) -> Any:
    folded = values[0]
    for value in values[1:]:
        folded = operation(folded, value)
    return folded
