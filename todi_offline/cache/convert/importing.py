"""A plain Parquet table from any program in, a cache out."""

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

    A table that `export_cache` wrote brings its own manifest; `described` is the manifest for any other table (its part
    is made here). Needed are input_ids, target_mask (or `positions`, the numbers of its true entries), target_ids and
    target_logprobs; for k = 0, tail_ids and tail_logprobs in the place of these two.

    - The entries of a target may have any order, and be more than k: a serving engine may add the label to its top k.
      Entries beyond k go into the tail.
    - Without tail_logsumexp, the tail at temperature 1 is log(1 - sum of the kept), in double precision. It is as far
      off as the kept log-probs were rounded, so little is known of a small tail. Other temperatures need the column.
    - Without label_logprob, the label must be among the entries of its target.

    All rows are checked before anything is written. The same call again continues a stopped import. The manifest holds
    the hash of a table that brought no manifest, so that a changed table is not taken for the same one.

    Raises:
        DataError: the table cannot be read, has no manifest, or has a wrong row; names the row.
        CacheError: `out` cannot be written or holds another cache.
    """
    with opened_table(path) as table:
        own, tokenizer = _metadata(table, str(path))
        if described is not None:
            described = _with_recipe(described, {"source": "imported", "table": _hash_file(path)})
        elif (described := own) is None:
            raise DataError(f"{path} has no manifest; name its teacher and tokenizer (--teacher, --tokenizer)")
        _require_columns(table, described.settings, str(path))
        return _write(table, str(path), out, described, tokenizer_json or tokenizer, progress)


@contextlib.contextmanager
def opened_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; every error of reading it, now and later, is a DataError."""
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
        raise CacheFormatError(f"the manifest in {where} cannot be read: {error}") from error
    manifest = Manifest.from_json(values, where)
    if not manifest.parts:
        raise CacheFormatError(f"the manifest in {where} has no part; export the cache again")
    manifest = dataclasses.replace(
        manifest, format_version=FORMAT_VERSION
    )  # an older release may have written the table
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
            f"{where} has no tail_logsumexp, which the temperatures "
            f"{', '.join(f'{t:g}' for t in settings.temperatures)} need; add the column, or import at temperature 1"
        )


def _rows(table: pq.ParquetFile) -> Iterator[tuple[int, Row]]:
    number = 0
    present = [name for name in COLUMN_NAMES if name in table.schema_arrow.names]
    for batch in table.iter_batches(_BATCH_ROWS, columns=present):
        for index in range(len(batch)):
            cells = {name: batch.column(name)[index] for name in present}
            yield number, {name: cell for name, cell in cells.items() if cell.is_valid}
            number += 1
