"""An object and its sum in, its difference out, with the damaged chunks and the sequences that lie in them."""

from dataclasses import dataclass

import google_crc32c
import numpy as np
import pyarrow as pa

from todi_offline.cache.format.layout import ArraySpec
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.shard import CRC_BYTES
from todi_offline.cache.objects import open_shard
from todi_offline.cache.store import Store
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError

_BLOCK_BYTES = 2**22
_SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """How an object differs from the bytes that were written."""

    what: str
    is_unreadable: bool = False
    """Whether the store cannot read the object, so that its bytes may be intact."""


def difference(store: Store, key: str, expected: ObjectSum) -> Difference | None:
    """Return how an object differs from its sum; a damaged local copy of a remote object is fetched again."""
    found = _difference_here(store, key, expected)
    return _difference_here(store, key, expected) if found and store.discard_copy(key) else found


def object_difference(store: Store, manifest: Manifest, record: CommitRecord, key: str) -> Difference | None:
    """Return how an object of a shard differs from its commit record: as a whole, or in its chunks."""
    if found := difference(store, key, record.objects[key]):
        return found
    name = key.partition("/")[0]
    if name not in manifest.arrays:
        return None
    try:
        sums = open_shard(store, manifest, record.objects, name, record.shard).read_sums()
    except CacheError as error:
        return Difference(str(error), not isinstance(error, CacheCorruptError | CacheIncompleteError))
    if sums == record.objects[key].chunks:
        return None
    return Difference("the chunks are intact but are not the ones that this commit record describes")


def damaged_chunks(store: Store, manifest: Manifest, record: CommitRecord, key: str, table: pa.Table | None) -> str:
    """Return, in words, the damaged chunks of an object and their sequences; an empty text if that is unknown."""
    spec = manifest.arrays.get(key.partition("/")[0])
    try:
        if spec is None or store.size(key) is None:
            return ""
        chunks = _unreadable_chunks(store, manifest, record, spec)
    except CacheCorruptError:
        return "; its chunk index is lost"
    except CacheError:
        return ""
    if not chunks:
        return ""
    return f"; the chunks {chunks} are damaged" + (_owners(manifest, record, spec, chunks, table) if table else "")


def _unreadable_chunks(store: Store, manifest: Manifest, record: CommitRecord, spec: ArraySpec) -> list[int]:
    file = open_shard(store, manifest, record.objects, spec.name, record.shard)
    file.read_sums()
    chunks = []
    for chunk in range(len(record.objects[spec.object_key(record.shard)].chunks) // CRC_BYTES):
        try:
            file.read_chunk(chunk)
        except CacheCorruptError:
            chunks.append(chunk)
    return chunks


def _owners(manifest: Manifest, record: CommitRecord, spec: ArraySpec, chunks: list[int], table: pa.Table) -> str:
    """Return the sequences that have rows in some chunks."""
    start = table[f"{spec.axis}_start"].to_numpy()
    stop = start + table[f"num_{spec.axis}s"].to_numpy()
    first = record.shard * manifest.settings.shard_tokens + np.array(chunks)[:, None] * spec.chunk_rows
    touched = ((start < first + spec.chunk_rows) & (stop > first)).any(axis=0)
    names = table["id"].filter(pa.array(touched)).to_pylist()
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f", of the sequences {', '.join(map(repr, names[:_SHOWN_NAMES])) + more or 'none'}"


def _difference_here(store: Store, key: str, expected: ObjectSum) -> Difference | None:
    """Return how an object, or its local copy, differs from its sum; read it in blocks."""
    try:
        path = store.local(key)
        num_bytes, crc = path.stat().st_size, 0
        if num_bytes != expected.num_bytes or not path.is_file():  # a pipe or a device may have no end
            return Difference(f"it has {num_bytes} bytes, expected {expected.num_bytes}")
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc = google_crc32c.extend(crc, block)
    except (CacheError, OSError) as error:
        return _failure(store, key, error)
    if crc == expected.crc32c:
        return None
    return Difference(f"it has {num_bytes} bytes with crc32c {crc:08x}, expected {expected.crc32c:08x}")


def _failure(store: Store, key: str, error: CacheError | OSError) -> Difference:
    """Return the difference of an object that could not be read: it is missing, or the store has failed."""
    why = error.strerror if isinstance(error, OSError) else str(error)
    try:
        if isinstance(error, CacheIncompleteError | FileNotFoundError | NotADirectoryError) and store.size(key) is None:
            return Difference("it is missing")
    except CacheError as failure:
        why = str(failure)
    return Difference(f"it cannot be read: {why}", is_unreadable=True)
