"""A cache in, a Parquet table that others read out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.layout import MANIFEST_KEY, TOKENIZER_KEY
from todi_offline.cache.reader import Cache, CachedSequence
from todi_offline.errors import DataError, first_line

_GROUP_TARGETS = 8_192  # of a row group, so that memory does not grow with the cache
_NO_LOGPROB = -1e9

_IDS, _NUMBERS = pa.list_(pa.uint32()), pa.list_(pa.float32())
PLAIN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("input_ids", _IDS),
        ("target_mask", pa.list_(pa.bool_())),
        ("target_ids", pa.list_(_IDS)),
        ("target_logprobs", pa.list_(_NUMBERS)),
        ("tail_logsumexp", pa.list_(_NUMBERS)),
        ("label_logprob", _NUMBERS),
        ("tail_ids", pa.list_(_IDS)),
        ("tail_logprobs", pa.list_(_NUMBERS)),
    ]
)
_INTEGERS = pa.list_(pa.int64())
AXOLOTL_SCHEMA = pa.schema(
    [
        ("input_ids", _INTEGERS),
        ("attention_mask", _INTEGERS),
        ("labels", _INTEGERS),
        ("target_token_ids", pa.list_(_INTEGERS)),
        ("target_logprobs", pa.list_(_NUMBERS)),
        ("target_mask", pa.list_(_INTEGERS)),
    ]
)
LAYOUTS = ("plain", "axolotl")

Progress = Callable[[int, int], None]
"""Called with the sequences done so far and all of them."""


def export_cache(cache: Cache, out: Path, layout: str = "plain", progress: Progress = lambda *_: None) -> int:
    """Write a cache as a Parquet table, a row a sequence; return the number of rows.

    `plain` has all that the cache holds: input_ids and target_mask by token, the others by target; with the manifest
    in the table's metadata, `import_table` makes the same cache of it.

    `axolotl` has the columns that the collator of axolotl's offline distillation takes (integrations/kd, as read in its
    releases 0.11.0 to 0.21.0): everything by token; row t of the targets is the teacher's prediction made at t, and its
    mask is 0 where there is none; labels are the tokens' own, which that loss shifts. It has no tail.

    Raises:
        CacheError: a part of the cache is damaged.
        DataError: the table cannot be written; nothing of it is left.
    """
    schema, row = {"plain": (PLAIN_SCHEMA, _plain_row), "axolotl": (AXOLOTL_SCHEMA, _axolotl_row)}[layout]
    metadata = {MANIFEST_KEY: json.dumps(cache.manifest.to_json())}
    if cache.store.size(TOKENIZER_KEY) is not None:
        metadata[TOKENIZER_KEY] = cache.store.read(TOKENIZER_KEY).decode()
    temporary = out.with_name(out.name + ".tmp")
    try:
        with pq.ParquetWriter(temporary, schema.with_metadata(metadata), compression="zstd") as writer:
            for members in _groups(cache.num_targets):
                names = {name: cache.sequences[name].slice(members.start, len(members)) for name in ("id", "source")}
                rows = [row(cache[index]) for index in members]
                columns = {name: [each[name] for each in rows] for name in rows[0]}
                arrays = [
                    pa.array(columns[field.name], field.type) if field.name in columns else names[field.name]
                    for field in schema
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema))
                progress(members.stop, len(cache))
        temporary.replace(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {first_line(error)}; mend that and run it again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(cache)


def _groups(num_targets: npt.NDArray[np.int32]) -> Iterator[range]:
    """Yield ranges of sequences that hold about as many targets as a row group should."""
    start = targets = 0
    for index, count in enumerate(num_targets.tolist()):
        targets += count
        if targets >= _GROUP_TARGETS or index + 1 == len(num_targets):
            yield range(start, index + 1)
            start, targets = index + 1, 0


def _plain_row(sequence: CachedSequence) -> dict[str, Any]:
    rows = sequence.targets
    sampled = rows.tail_ids is not None and rows.tail_logprobs is not None
    return {
        "input_ids": sequence.token_ids,
        "target_mask": sequence.target_mask,
        "target_ids": list(rows.ids),
        "target_logprobs": list(rows.logprobs),
        "tail_logsumexp": list(rows.tail_logsumexp),
        "label_logprob": rows.label_logprob,
        "tail_ids": list(rows.tail_ids) if sampled and rows.tail_ids is not None else None,
        "tail_logprobs": list(rows.tail_logprobs) if sampled and rows.tail_logprobs is not None else None,
    }


def _axolotl_row(sequence: CachedSequence) -> dict[str, Any]:
    length, k = len(sequence.token_ids), sequence.targets.ids.shape[1]
    mask = sequence.target_mask
    ids = np.tile(np.arange(k), (length, 1))
    logprobs = np.full((length, k), _NO_LOGPROB, np.float32)
    ids[mask], logprobs[mask] = sequence.targets.ids, sequence.targets.logprobs
    labels = np.where(np.concatenate([[False], mask[:-1]]), sequence.token_ids.astype(np.int64), -100)
    return {
        "input_ids": sequence.token_ids.astype(np.int64),
        "attention_mask": np.ones(length, np.int64),
        "labels": labels,
        "target_token_ids": list(ids),
        "target_logprobs": list(logprobs),
        "target_mask": list(np.repeat(mask[:, None], k, axis=1).astype(np.int64)),
    }
