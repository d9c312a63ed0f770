"""A plain Parquet table and a few settings in, the manifest of the cache to be made from it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from todi_offline.cache.convert.cells import require_types
from todi_offline.cache.convert.importing import opened_table
from todi_offline.cache.convert.tokenizer_files import read_tokenizer_files
from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.config import load_config
from todi_offline.errors import ConfigError, DataError

_BATCH_ROWS = 64


def describe_table(
    table: Path, teacher: str | None, tokenizer: Path | None, settings: dict[str, Any]
) -> tuple[Manifest | None, str | None]:
    """Return the manifest and the tokenizer for a table that brings none; None for a table that is to bring its own."""
    if teacher is None and tokenizer is None and not settings:
        return None, None
    if teacher is None or tokenizer is None:
        raise ConfigError(
            "a table without a manifest needs both --teacher and --tokenizer; to import a table of `todi-cache "
            "export`, leave out all options, and change its settings with `todi-cache subset`"
        )
    files = read_tokenizer_files(tokenizer)
    k = settings["k"] if "k" in settings else fewest_entries(table)
    settings = {"temperatures": (1.0,), "tail_samples": 0, **settings, "k": k}
    chosen = load_config(CacheSettings, overrides=settings)
    vocab_size = max(files.get_vocab().values()) + 1
    manifest = imported_manifest(chosen, vocab_size, teacher, tokenizer_fingerprint(files))
    return manifest, files.backend_tokenizer.to_str()


def imported_manifest(settings: CacheSettings, vocab_size: int, teacher: str, tokenizer: Mapping[str, str]) -> Manifest:
    """Return the manifest of foreign targets; of their teacher only the name is known."""
    fingerprint = {"model_type": "imported", "name": teacher}
    part = Part(recipe={}, content="", num_sequences=1, num_shards=1, versions={})
    return Manifest(settings=settings, vocab_size=vocab_size, teacher=fingerprint, tokenizer=tokenizer, parts=(part,))


def fewest_entries(path: Path) -> int:
    """Return the fewest entries of any target: the largest k with which the table can be imported.

    Raises:
        DataError: the table cannot be read, or has a target without entries.
    """
    with opened_table(path) as table:
        if "target_ids" not in table.schema_arrow.names:
            raise DataError(f"{path} lacks the column target_ids; it has {', '.join(table.schema_arrow.names)}")
        require_types(table.schema_arrow, str(path))
        fewest = [
            pc.min(pc.list_value_length(lists)).as_py()
            for batch in table.iter_batches(_BATCH_ROWS, columns=["target_ids"])
            if not pa.types.is_null(batch.column(0).type) and len(lists := batch.column(0).flatten())
        ]
    k = min((count for count in fewest if count is not None), default=0)
    if not k:
        raise DataError(
            f"{path}, column target_ids: a target has no entry; leave such targets out of target_mask, or import "
            "samples alone with --k 0"
        )
    return int(k)
