"""The name of a file, a folder, a hub data set or `stdlib` comes in; rows go out."""

import contextlib
import csv
import itertools
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from todi_offline.data.examples import BATCH_ROWS, DataConfig
from todi_offline.data.stdlib_corpus import SPLITS, stdlib_pairs
from todi_offline.data.tokens import Row
from todi_offline.errors import DataError, first_line


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of a data set, its short name, and its entries in the recipe."""

    rows: Iterable[Row]
    name: str
    recipe: dict[str, Any]
    identity: Any = None
    """A JSON value that changes when the rows change. None if there is no such value, or nothing needs one."""


def open_source(config: DataConfig) -> Source:
    """Open the data set that `config.data` names.

    Raises:
        DataError: there is no such file, folder, hub id or split.
    """
    path = Path(config.data).expanduser()
    if config.data == "stdlib":
        split = _choose_split(config.split, SPLITS, "stdlib")
        pairs = stdlib_pairs(split)
        rows = [{"id": pair.id, "instruction": pair.instruction, "output": pair.response} for pair in pairs]
        recipe = {"source": "stdlib", "split": split, "python": platform.python_version()}
        return Source(rows, f"stdlib/{split}", recipe)
    if path.is_dir():
        return _open_folder(path, config.split)
    if path.is_file():
        _choose_split(config.split, ["train"], path.name)
        stat = path.stat()
        identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        return Source(_read_file(path), path.name, {"source": path.name, "split": None}, identity)
    if path.suffix.lower() in _READERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", config.data):
        raise DataError(f"there is no file or folder {config.data}; expected one, a hub id, or stdlib")
    return _open_hub(config)


def _choose_split(wanted: str | None, splits: Sequence[str], source: str) -> str:
    chosen = wanted or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if chosen not in splits:
        problem = f"has no split {wanted!r}" if wanted else "has several splits"
        raise DataError(f"{source} {problem}; choose one of: {', '.join(splits)}")
    return chosen


def _open_folder(path: Path, split: str | None) -> Source:
    import datasets

    name = path.resolve().name
    try:
        with _quiet():
            loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a folder that `datasets` saved ({first_line(error)}); name a file within it, or save the "
            "data set with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose_split(split, list(loaded), name)
        rows = loaded[chosen].with_format(None)
        return Source(rows, f"{name}/{chosen}", {"source": name, "split": chosen}, rows._fingerprint)
    _choose_split(split, [str(loaded.split or "train")], name)
    rows = loaded.with_format(None)
    return Source(rows, name, {"source": name, "split": None}, rows._fingerprint)


def _open_hub(config: DataConfig) -> Source:
    import datasets

    name, revision = config.data, {"revision": config.data_revision} if config.data_revision else {}
    try:
        with _quiet():
            splits = datasets.get_dataset_split_names(name, config.subset, **revision)
            chosen = _choose_split(config.split, splits, name)
            rows = datasets.load_dataset(name, config.subset, split=chosen, streaming=config.streaming, **revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} is not a file or folder here, and the hub cannot give it: {first_line(error)}; check the name"
        ) from error
    recipe = {"source": name, "split": chosen}
    recipe |= {"subset": config.subset} if config.subset else {}
    recipe |= revision
    return Source(rows, f"{name}/{chosen}", recipe, None if config.streaming else rows._fingerprint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets` and of the hub if stderr is not a terminal."""
    import datasets
    import huggingface_hub.utils

    shown = [owner for owner in (datasets, huggingface_hub.utils) if not owner.are_progress_bars_disabled()]
    hidden = [] if sys.stderr.isatty() else shown
    for owner in hidden:
        owner.disable_progress_bars()
    try:
        yield
    finally:
        for owner in hidden:
            owner.enable_progress_bars()


def _read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file one by one. Only a JSON list is read into memory as a whole."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} has no known suffix; expected one of {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        if _starts_a_list(file):
            yield from json.load(file)
            return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise ValueError(
                    f"line {number} is not valid JSON ({error}); expected one object a line, or a list of objects"
                ) from error
            if row is not None:
                yield row


def _starts_a_list(file: TextIO) -> bool:
    """Tell whether the first character that is not blank is `[`, and rewind the file."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == "["


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long text
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"the row that ends in line {reader.line_num} has more or fewer fields than the header"
                )
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Row]:
    with pa.memory_map(str(path)) as source:
        try:
            batches = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def _read_text(path: Path) -> Iterator[Row]:
    """Yield the paragraphs of a text file; blank lines separate them."""
    with path.open(encoding="utf-8-sig") as file:
        for is_blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
            if not is_blank:
                yield {"text": "".join(lines).rstrip("\n")}


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
