"""A plain Parquet table in, from whatever made it, a cache out."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.convert.cells import COLUMN_NAMES, Row, require_types
from todi_offline.cache.convert.export import MANIFEST_KEY
from todi_offline.cache.convert.imported_rows import imported_sequence
from todi_offline.cache.format.fingerprint import hash_bytes
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import FORMAT_VERSION, CacheSettings
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import TOKENIZER_KEY
from todi_offline.cache.planning import plan_shards
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheFormatError, DataError, first_line

_BATCH_ROWS = 64
_BLOCK_BYTES = 2**20


def import_table(
    path: Path,
    out: str,
    described: Manifest | None = None,
    tokenizer_json: str | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a cache of the rows of a plain table (see `export_cache`); return its manifest.

    A table that `export_cache` wrote brings its own description; `described` is that of any other (its part is made
    here). Needed are input_ids, target_mask (or `positions`, the numbers of its true entries), target_ids and
    target_logprobs; for k = 0, tail_ids and tail_logprobs in the place of these two.

    - The entries of a target may stand in any order, and be more than k: as where a serving engine adds the label to
      its top k. What is beyond k goes into the tail.
    - Without tail_logsumexp, the tail at temperature 1 is log(1 - sum of the kept), in double precision: off by as
      much mass as the kept log-probs were rounded by, so of a small tail little is known. At another temperature
      it cannot be had.
    - Without label_logprob, it is that of the same id among the entries, which must have it.

    All rows are looked at before anything is written. The same call again goes on where it was stopped; the manifest
    has the hash of a table that brought none, so that a changed one is not taken for it.

    Raises:
        DataError: the table cannot be read, is not described, or has a wrong row, which is named.
        CacheError: `out` cannot be written or holds something else.
    """
    with opened_table(path) as table:
        own, tokenizer = _metadata(table, str(path))
        if described is not None:
            described = _with_recipe(described, {"source": "imported", "table": _hash_file(path)})
        elif (described := own) is None:
            raise DataError(f"{path} brings no manifest; say its teacher and tokenizer")
        _require_columns(table, described.settings, str(path))
        return _write(table, str(path), out, described, tokenizer_json or tokenizer, progress)


@contextlib.contextmanager
def opened_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; whatever is wrong with it, then and later, is a DataError."""
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _with_recipe(manifest: Manifest, recipe: Mapping[str, Any]) -> Manifest:
    return dataclasses.replace(manifest, parts=(dataclasses.replace(manifest.parts[0], recipe=recipe),))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hash_bytes(iter(partial(file.read, _BLOCK_BYTES), b""))


def _write(
    table: pq.ParquetFile,
    where: str,
    out: str,
    described: Manifest,
    tokenizer_json: str | None,
    progress: Progress,
) -> Manifest:
    total = 2 * table.metadata.num_rows
    lengths, keys = [], []
    for number, row in _rows(table):
        sequence = imported_sequence(number, row, where, described)
        lengths.append(len(sequence.token_ids))
        keys.append(sequence.content_key)
        progress(number + 1, total)
    plan = plan_shards(lengths, described.settings.shard_tokens)
    part = dataclasses.replace(
        described.parts[0], content=ContentKeys.of(keys).digest(), num_sequences=len(keys), num_shards=len(plan)
    )
    manifest = dataclasses.replace(described, parts=(part,))
    rows = _rows(table)
    with CacheWriter(out, manifest, tokenizer_json) as writer:
        missing = set(writer.missing_shards())
        for shard in plan:
            members = (next(rows) for _ in shard.examples)
            if shard.index in missing:
                sequences = [imported_sequence(number, row, where, manifest) for number, row in members]
                writer.write_shard(shard.index, sequences)
            else:
                list(members)
            progress(len(keys) + shard.stop, total)
        writer.seal()
    return manifest


def _metadata(table: pq.ParquetFile, where: str) -> tuple[Manifest | None, str | None]:
    """Return the manifest and the tokenizer that a table brings."""
    metadata = table.schema_arrow.metadata or {}
    if MANIFEST_KEY.encode() not in metadata:
        return None, None
    tokenizer = metadata.get(TOKENIZER_KEY.encode())
    try:
        values = json.loads(metadata[MANIFEST_KEY.encode()])
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{where} brings a manifest that cannot be read: {error}") from error
    manifest = Manifest.from_json(values, where)
    if not manifest.parts:
        raise CacheFormatError(f"{where} brings a manifest without a part; export the cache again")
    manifest = dataclasses.replace(manifest, format_version=FORMAT_VERSION)  # an older release may have exported it
    return manifest, None if tokenizer is None else tokenizer.decode(errors="replace")


def _require_columns(table: pq.ParquetFile, settings: CacheSettings, where: str) -> None:
    require_types(table.schema_arrow, where)
    names = table.schema_arrow.names
    mask = [] if "positions" in names else ["target_mask"]
    sampled = ["tail_ids", "tail_logprobs"] if settings.tail_samples else []
    kept = ["target_ids", "target_logprobs"] if settings.k else []
    needed = ["input_ids", *mask, *kept, *sampled]
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(names)}")
    if "tail_logsumexp" not in names and settings.temperatures != (1.0,):
        raise DataError(
            f"{where} has no tail_logsumexp, so temperature 1 is all that can be had of it, not "
            f"{', '.join(f'{t:g}' for t in settings.temperatures)}; ask for temperature 1 alone"
        )


def _rows(table: pq.ParquetFile) -> Iterator[tuple[int, Row]]:
    number = 0
    present = [name for name in COLUMN_NAMES if name in table.schema_arrow.names]
    for batch in table.iter_batches(_BATCH_ROWS, columns=present):
        for index in range(len(batch)):
            cells = {name: batch.column(name)[index] for name in present}
            yield number, {name: cell for name, cell in cells.items() if cell.is_valid}
            number += 1
