"""A cache in, a Parquet table for other programs out."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.format.names import TOKENIZER_KEY
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.objects import read_root, read_tokenizer
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.reader import Cache
from todi_offline.errors import ConfigError, DataError, TargetsError, first_line

MANIFEST_KEY = "todi_offline"  # of the table's metadata
_GROUP_TARGETS = 8_192  # in a row group, so that memory does not grow with the cache
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
        ("log_partition", _NUMBERS),
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


def export_cache(
    cache: Cache,
    out: Path,
    layout: str = "plain",
    temperature: float = 1.0,
    progress: Progress = no_progress,
) -> int:
    """Write a cache as a Parquet table with a row for each sequence; return the number of rows.

    The layout `plain` has all contents of the cache: input_ids and target_mask by token, the other columns by target.
    The metadata of the table hold the manifest, so `import_table` makes the same cache again.

    The layout `axolotl` has the columns that axolotl's offline distillation takes (the collator of integrations/kd in
    its releases 0.11.0 to 0.21.0), all of them by token. Row t of the targets is the teacher's prediction made at t;
    its mask is 0 where there is none. Labels are those of the same token; axolotl's loss shifts them. The layout has no
    tail: log-probs are over the whole vocabulary at `temperature`, axolotl's kd_temperature, so set kd_normalize_topk
    to false.

    Raises:
        ConfigError: the name of the file does not end in .parquet, or is a URL.
        TargetsError: the temperature was not captured, or is not 1 for the layout `plain`; or the layout is `axolotl`
            and the cache keeps samples alone.
        CacheError: a part of the cache is damaged.
        DataError: the table cannot be written; no part of it is left.
    """
    _require_parquet(out)
    if temperature != 1 and (layout == "plain" or temperature not in cache.manifest.settings.temperatures):
        captured = ", ".join(f"{t:g}" for t in cache.manifest.settings.temperatures)
        raise TargetsError(
            f"cannot export log-probs at temperature {temperature:g}; the layout plain takes only 1, and axolotl 1 or "
            f"a captured temperature of {cache.root}: {captured}"
        )
    if layout == "axolotl" and not cache.manifest.settings.k:
        raise TargetsError(
            f"{cache.root} holds only samples (k = 0), and the layout axolotl has no column for them; export it as "
            "plain"
        )
    row: Callable[[CachedSequence], dict[str, Any]] = _plain_row
    schema = {"plain": PLAIN_SCHEMA, "axolotl": AXOLOTL_SCHEMA}[layout]
    if layout == "axolotl":
        row = partial(_axolotl_row, temperature=temperature)
    metadata = {MANIFEST_KEY: json.dumps(cache.manifest.to_json())}
    if (tokenizer := read_tokenizer(cache.store, read_root(cache.store))) is not None:
        metadata[TOKENIZER_KEY] = tokenizer
    temporary = out.with_name(out.name + ".tmp")
    try:
        sequences = iter(cache)
        with pq.ParquetWriter(temporary, schema.with_metadata(metadata), compression="zstd") as writer:
            for members in _groups(cache.num_targets):
                names = {name: cache.sequences[name].slice(members.start, len(members)) for name in ("id", "source")}
                rows = [row(sequence) for sequence in islice(sequences, len(members))]
                columns = {name: [each[name] for each in rows] for name in rows[0]}
                arrays = [
                    pa.array(columns[field.name], field.type) if field.name in columns else names[field.name]
                    for field in schema
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema))
                progress(members.stop, len(cache))
        temporary.replace(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {first_line(error)}; fix that and run the export again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(cache)


def _require_parquet(out: Path) -> None:
    if re.match(r"[a-z][a-z0-9]+:/", str(out)):
        raise ConfigError(f"{out} is a URL, and an export is a local file; name a local file, and upload it")
    if out.suffix.lower() != ".parquet":
        raise ConfigError(
            f"{out} does not end in .parquet, the only format of an export; name it {out.stem or 'targets'}.parquet"
        )


def _groups(num_targets: npt.NDArray[np.int32]) -> Iterator[range]:
    """Yield ranges of sequences with about as many targets as a row group holds."""
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
        "log_partition": rows.log_partition,
    }


def _axolotl_row(sequence: CachedSequence, temperature: float) -> dict[str, Any]:
    length, k = len(sequence.token_ids), sequence.targets.ids.shape[1]
    mask = sequence.target_mask
    ids = np.tile(np.arange(k), (length, 1))
    logprobs = np.full((length, k), _NO_LOGPROB, np.float32)
    ids[mask], logprobs[mask] = sequence.targets.ids, _logprobs_at(sequence.targets, temperature)
    labels = np.where(np.concatenate([[False], mask[:-1]]), sequence.token_ids.astype(np.int64), -100)
    return {
        "input_ids": sequence.token_ids.astype(np.int64),
        "attention_mask": np.ones(length, np.int64),
        "labels": labels,
        "target_token_ids": list(ids),
        "target_logprobs": list(logprobs),
        "target_mask": list(np.repeat(mask[:, None], k, axis=1).astype(np.int64)),
    }


def _logprobs_at(rows: TargetRows, temperature: float) -> npt.NDArray[np.float32]:
    """Return the log-probs at a captured temperature, over the whole vocabulary."""
    if temperature == 1:
        return rows.logprobs
    scaled = rows.logprobs.astype(np.float64) / temperature
    tail = rows.tail_logsumexp[:, [rows.temperatures.index(temperature)]]
    log_partition = np.logaddexp.reduce(np.concatenate([scaled, tail], axis=1), axis=1)
    logprobs: npt.NDArray[np.float64] = scaled - log_partition[:, None]
    return logprobs.astype(np.float32)
