"""A cache folder in, sequences with their targets out, in any order."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.format.encoding import TargetRows, decode_rows
from todi_offline.cache.format.fingerprint import Keys, as_keys
from todi_offline.cache.format.layout import APPEND_KEY, MANIFEST_KEY, SEQUENCE_SCHEMA, record_key, sequences_key
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.records import (
    SEAL_KEY,
    CommitRecord,
    ObjectSum,
    committed_shards,
    read_object,
    read_record,
    read_seal,
)
from todi_offline.cache.format.shard import ShardFile
from todi_offline.cache.store import Store, open_store
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError, first_line

_TABLE_BATCH = 256
_READERS = 16  # threads; each waits for a store
_PLACE = ("shard", "token_start", "num_tokens", "target_start", "num_targets")
_TEXT = ("id", "source")
_KEY = "content_key"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CachedSequence:
    """A sequence as the teacher read it, with its targets."""

    token_ids: npt.NDArray[np.uint32]
    """[token]"""
    target_mask: npt.NDArray[np.bool_]
    """[token]: True at t where the prediction made at t, for token t + 1, is stored."""
    targets: TargetRows
    """One row for each True of `target_mask`, in order."""


def open_cache(place: str | Path | Store, *, allow_unsealed: bool = False) -> "Cache":
    """Open a cache for reading.

    `allow_unsealed` admits one whose capture has not finished: its committed shards are read.

    Raises:
        CacheFormatError: the folder is no cache, or one of another format version.
        CacheIncompleteError: it is not sealed, or a part of it is missing.
        CacheCorruptError: metadata or the sequence table are not what was written.
    """
    store = open_store(place)
    manifest = read_manifest(store)
    if allow_unsealed and store.size(SEAL_KEY) is None:
        shards = [shard for shard in committed_shards(store) if shard < manifest.num_shards]
    else:
        seal = read_seal(store)
        try:
            _map(partial(read_object, store), seal.objects.keys(), seal.objects.values())
        except CacheCorruptError as error:
            if not (ends_append(store) or read_seal(store) != seal):
                raise
            raise CacheIncompleteError(
                f"{store} is between two seals: a capture that appends to it is just being finished, or was stopped "
                "then; open it again, or else run that capture again"
            ) from error
        manifest = read_manifest(store)  # what was read before the seal may be of the one before it
        shards = list(range(seal.num_shards))
    return Cache(store, manifest, _map(partial(read_shard_record, store, manifest), shards))


def _map(read: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """Read many small objects at once: an object store takes its time over each."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, *arguments))


def read_manifest(store: Store, key: str = "zarr.json") -> Manifest:
    """Read what a cache says of itself, or what `append.json` says that it will."""
    if store.size(key) is None:
        raise CacheFormatError(f"{store} is no cache: it has no {key}; name the folder that `todi capture` wrote")
    try:
        values = json.loads(read_object(store, key))["attributes"][MANIFEST_KEY]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheFormatError(f"{store}/{key} holds no todi_offline manifest") from error
    return Manifest.from_json(values, str(store))


def ends_append(store: Store) -> bool:
    """Whether a capture that appends has begun to make its shards part of the cache, and not finished."""
    return store.size(APPEND_KEY) is not None and store.read(APPEND_KEY) == store.read("zarr.json")


class Cache:
    """A sequence of `CachedSequence`. Safe to fork and to share between threads: it holds no open file."""

    def __init__(self, store: Store, manifest: Manifest, records: Sequence[CommitRecord]) -> None:
        """Use `open_cache`."""
        if not sum(record.num_sequences for record in records):
            raise CacheIncompleteError(f"{store} holds no committed shard yet; run its capture again to go on")
        self.store = store
        self.manifest = manifest
        with ThreadPoolExecutor(_READERS) as pool:
            self.columns = _joined(pool.map(partial(_read_columns, store, manifest), records))
            """The sequence table but for its text, [sequence] each: 52 bytes a sequence in memory."""
        pa.default_memory_pool().release_unused()  # what the threads leave behind is as much again
        self._records = records
        self._objects = {key: found for record in records for key, found in record.objects.items()}

    @property
    def root(self) -> str:
        """The place of the cache."""
        return str(self.store)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.columns["shard"])

    def __iter__(self) -> Iterator[CachedSequence]:
        """Yield the sequences in the order of the capture."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> CachedSequence:
        """Read a sequence; every chunk that is touched is compared with its checksum.

        Raises:
            CacheCorruptError, CacheIncompleteError: naming sequence, file and chunk.
        """
        index = range(len(self))[index]
        shard, token_start, num_tokens, target_start, num_targets = (int(self.columns[name][index]) for name in _PLACE)
        first = shard * self.manifest.settings.shard_tokens
        spans = {
            "token": (token_start - first, token_start - first + num_tokens),
            "target": (target_start - first, target_start - first + num_targets),
        }
        try:
            arrays = {
                name: self._read_rows(name, shard, *spans[spec.axis]) for name, spec in self.manifest.arrays.items()
            }
        except CacheError as error:
            raise type(error)(f"{self._name(index)}: {error}") from error
        return self._decode(index, arrays)

    def _read_rows(self, name: str, shard: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows of a shard; where a local copy of it is damaged or gone, from another copy."""
        try:
            return open_shard(self.store, self.manifest, self._objects, name, shard).read_rows(start, stop)
        except CacheError:
            if not self.store.discard_copy(self.manifest.arrays[name].object_key(shard)):
                raise
        try:
            return open_shard(self.store, self.manifest, self._objects, name, shard).read_rows(start, stop)
        except CacheError as error:
            raise type(error)(f"fetched twice from {self.store}: {error}") from error

    def _name(self, index: int) -> str:
        """Return how messages call a sequence; reads its id from the table of its shard."""
        ends = np.cumsum([record.num_sequences for record in self._records])
        number = int(np.searchsorted(ends, index, side="right"))
        try:
            table = read_table(self.store, self._records[number])
        except CacheError:
            return f"sequence {index}"
        return f"sequence {table['id'][index - int(ends[number])].as_py()!r} (number {index})"

    def _decode(self, index: int, arrays: dict[str, npt.NDArray[Any]]) -> CachedSequence:
        settings = self.manifest.settings
        token_ids, mask = arrays.pop("token_ids"), arrays.pop("target_mask").astype(np.bool_)
        if mask[-1:].any():
            raise CacheCorruptError(
                f"sequence {index} of {self.root} supervises its last position, which no token follows; "
                "run `todi-cache verify`"
            )
        if mask.sum() != len(arrays["topk_ids"]):
            raise CacheCorruptError(
                f"sequence {index} of {self.root} has {mask.sum()} supervised positions and "
                f"{len(arrays['topk_ids'])} targets; run `todi-cache verify`"
            )
        rows = decode_rows(arrays, settings.encoding, settings.temperatures, settings.tail_temperature)
        return CachedSequence(token_ids, mask, rows)

    @property
    def num_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of every sequence."""
        return self.columns["num_tokens"]

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """Targets of every sequence."""
        return self.columns["num_targets"]

    @property
    def content_keys(self) -> Keys:
        """Content keys of every sequence."""
        return self.columns[_KEY]

    @cached_property
    def sequences(self) -> pa.Table:
        """The sequence table, with its text; it is read when it is first asked for."""
        return pa.concat_tables(_map(partial(read_table, self.store), self._records))

    @property
    def shards(self) -> npt.NDArray[np.uint32]:
        """The shard of every sequence."""
        return self.columns["shard"]

    def prepare(self, shard: int) -> None:
        """Fetch what an object store holds of a shard, so that reading it soon need not wait.

        Raises:
            CacheIncompleteError, CacheError: it cannot be fetched.
        """
        for spec in self.manifest.arrays.values():
            self.store.prepare(spec.object_key(shard))

    @cached_property
    def bytes_by_array(self) -> Mapping[str, int]:
        """Bytes on disk by array, and of the sequence tables."""
        sums = {"sequences": 0, **dict.fromkeys(self.manifest.arrays, 0)}
        for key, found in self._objects.items():
            sums[key.split("/")[0]] += found.num_bytes
        return sums


def _read_columns(store: Store, manifest: Manifest, record: CommitRecord) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a shard's sequence table that are no text."""
    table = read_table(store, record)
    require_places(str(store), table, manifest, record.shard)
    numbers = {name: np.array(table[name].to_numpy()) for name in table.column_names if name not in (*_TEXT, _KEY)}
    return {_KEY: keys_of(table), **numbers}


def _joined(parts: Iterable[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Join columns as they come: many small arrays, kept until the end, would leave holes in the memory."""
    columns: dict[str, npt.NDArray[Any]] = {}
    length = 0
    for part in parts:
        length += len(part[_KEY])
        for name, piece in part.items():
            whole = columns.setdefault(name, np.empty(0, piece.dtype))
            if length > len(whole):
                whole.resize(max(length, len(whole) * 5 // 4), refcheck=False)
            whole[length - len(piece) : length] = piece
    for whole in columns.values():
        whole.resize(length, refcheck=False)
    return columns


def keys_of(table: pa.Table) -> Keys:
    """Return the content keys of a sequence table."""
    return as_keys(table[_KEY].to_pylist())


def read_shard_record(store: Store, manifest: Manifest, shard: int) -> CommitRecord:
    """Read the commit record of a shard, which names what a cache with this manifest holds of it.

    Raises:
        CacheIncompleteError: the shard has none.
        CacheFormatError: it is no such record.
    """
    record = read_record(store, record_key(shard))
    expected = {
        sequences_key(shard): 0,
        **{spec.object_key(shard): spec.chunks_per_shard for spec in manifest.arrays.values()},
    }
    found = {key: len(sums.chunks) // 4 for key, sums in record.objects.items()}
    most = max(record.num_sequences, record.num_tokens, record.num_targets)
    if record.shard != shard or found != expected or most > manifest.settings.shard_tokens:
        differing = sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key))
        what = ", ".join(differing) or f"it is of shard {record.shard}, with {most} rows"
        raise CacheFormatError(f"{store}/{record_key(shard)} is not the record of shard {shard}: {what}")
    return record


def open_shard(store: Store, manifest: Manifest, objects: Mapping[str, ObjectSum], name: str, shard: int) -> ShardFile:
    """Return the object of an array in a shard; `objects` are those that its commit record names."""
    spec = manifest.arrays[name]
    key = spec.object_key(shard)
    return ShardFile(store.local(key), spec, manifest.settings.codec, objects[key].chunks)


def read_table(store: Store, record: CommitRecord) -> pa.Table:
    """Read the sequence table of a committed shard.

    Raises:
        CacheError: it is not what its commit record says, or names places that the shard does not have.
    """
    key = sequences_key(record.shard)
    data = read_object(store, key, record.objects[key])
    try:
        return _parse_table(data, record, f"{store}/{key}")
    except (pa.ArrowException, OSError) as error:
        raise CacheCorruptError(f"{store}/{key} cannot be read: {first_line(error)}") from error


def _parse_table(data: bytes, record: CommitRecord, where: str) -> pa.Table:
    """Parse a sequence table; few bytes of Parquet can claim any number of rows, and unfold to as many of bytes."""
    file = pq.ParquetFile(pa.BufferReader(data))
    if file.schema_arrow.remove_metadata() != SEQUENCE_SCHEMA:
        raise CacheFormatError(f"{where} has the columns {file.schema_arrow.names}")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    if file.metadata.num_rows != record.num_sequences or any(c.compression != "UNCOMPRESSED" for c in columns):
        raise CacheFormatError(
            f"{where} has {file.metadata.num_rows} rows, expected {record.num_sequences}, uncompressed"
        )
    batches, num_bytes = [], 0
    for batch in file.iter_batches(_TABLE_BATCH, use_threads=False):
        batch.validate(full=True)
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > 2**20 + 64 * len(data):
            raise CacheFormatError(f"{where} unfolds from {len(data)} bytes to more than {num_bytes}")
    return pa.Table.from_batches(batches, SEQUENCE_SCHEMA).combine_chunks()


def require_places(place: str, table: pa.Table, manifest: Manifest, shard: int) -> None:
    """Refuse a table with a hole, or with a sequence outside the rows of the shard that it is of."""
    if any(column.null_count for column in table.columns):
        raise CacheFormatError(f"a sequence table of {place} has empty cells; run `todi-cache verify`")
    num_rows = manifest.settings.shard_tokens
    if (table["shard"].to_numpy() != shard).any():
        raise CacheFormatError(f"the sequence table of shard {shard} of {place} names other shards")
    for axis in ("token", "target"):
        start = table[f"{axis}_start"].to_numpy() - shard * num_rows
        count = table[f"num_{axis}s"].to_numpy().astype(np.int64)
        outside = np.flatnonzero((start < 0) | (count < 0) | (start > num_rows - count))
        if len(outside):
            name = table["id"][int(outside[0])].as_py()
            raise CacheFormatError(
                f"sequence {name!r} of {place} lies outside its shard on the {axis} axis "
                f"({count[outside[0]]} rows from {start[outside[0]]} of {num_rows}); run `todi-cache verify`"
            )
