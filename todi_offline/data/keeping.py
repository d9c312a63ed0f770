"""Batches of examples come in; one table goes out, in memory or in a memory-mapped file that a later run reuses."""

import dataclasses
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from todi_offline.cache.format.fingerprint import hash_json, tokenizer_fingerprint
from todi_offline.data.examples import DataConfig
from todi_offline.data.templates import read_template
from todi_offline.folders import user_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEEP_ROWS = 10_000
"""Data sets with fewer examples are not kept: tokenising them again is fast."""

IN_MEMORY_BYTES = 1 << 30
"""Examples larger than this go into a file, which is kept or temporary."""

_LIBRARIES = ("todi-offline", "transformers", "tokenizers", "trl")
_NOT_IDENTITY = ("data", "num_proc", "examples_dir", "streaming")


@dataclass(frozen=True, slots=True)
class Place:
    """The two files of a tokenised data set: its table, and its report and recipe, which are written last."""

    table: Path
    facts: Path
    """The report and the recipe, as JSON."""


def choose_place(config: DataConfig, identity: Any, tokenizer: "PreTrainedTokenizerBase") -> Place:
    """Return the files for a data set's examples; their names are a hash of everything that decides the examples."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {name: value for name, value in settings.items() if name not in _NOT_IDENTITY}
    template = tokenizer.chat_template if config.chat_template is None else read_template(config.chat_template)
    name = hash_json(
        [
            identity,
            settings | {"chat_template": template},
            tokenizer_fingerprint(tokenizer),
            {library: _version(library) for library in _LIBRARIES},
        ]
    )
    folder = config.examples_dir or user_cache("examples")
    return Place(folder / f"{name}.arrow", folder / f"{name}.json")


def read_kept(place: Place) -> tuple[pa.Table, dict[str, Any]] | None:
    """Return a kept table, memory-mapped, with its report and recipe; None if the data set was not kept."""
    if not (place.table.is_file() and place.facts.is_file()):
        return None
    logger.info("reading the tokenised examples from %s", place.table)
    return _mapped(place.table), json.loads(place.facts.read_text(encoding="utf-8"))


def keep_facts(place: Place, facts: Mapping[str, Any]) -> None:
    """Write the report and recipe of a kept table, which makes the table valid. Do nothing if no table was kept."""
    if place.table.is_file():
        _replace(place.facts, lambda path: path.write_text(json.dumps(facts), encoding="utf-8"))


def gather_table(batches: Iterator[pa.RecordBatch], schema: pa.Schema, place: Place | None) -> pa.Table:
    """Gather batches into one table. A large table goes into its place, or into a temporary file if it has none."""
    gathered: list[pa.RecordBatch] = []
    num_bytes = num_rows = 0
    for batch in batches:
        gathered.append(batch)
        num_bytes, num_rows = num_bytes + batch.nbytes, num_rows + len(batch)
        is_large = num_bytes > IN_MEMORY_BYTES
        if place is not None and (is_large or num_rows >= KEEP_ROWS):
            place.table.parent.mkdir(parents=True, exist_ok=True)
            _replace(place.table, lambda path: _write(path, schema, itertools.chain(gathered, batches)))
            return _mapped(place.table)
        if is_large:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "examples.arrow"
                _write(path, schema, itertools.chain(gathered, batches))
                return _mapped(path)
    return pa.Table.from_batches(gathered, schema)


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _replace(path: Path, write: Any) -> None:
    """Write a file under a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
