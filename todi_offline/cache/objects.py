"""A store in, the objects of its cache out: parsed, and compared with their sums."""

import dataclasses
import json
from collections.abc import Mapping

import pyarrow as pa

from todi_offline.cache.format.codecs import array_metadata, group_metadata
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import (
    GROUP_KEY,
    RECORDS_PREFIX,
    ROOT_KEY,
    TOKENIZER_KEY,
    array_key,
    attempt_key,
    is_attempt,
    record_key,
    sequences_key,
    shard_of,
)
from todi_offline.cache.format.notes import Note
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.root import Root
from todi_offline.cache.format.sequences import parse_table
from todi_offline.cache.format.version_1 import ATTRIBUTE, read_version_1
from todi_offline.cache.shard_file import ShardFile
from todi_offline.cache.store import Store
from todi_offline.errors import CacheCorruptError, CacheFormatError, CacheIncompleteError


def read_root(store: Store) -> Root:
    """Return the root of a cache; of a format 1 cache, the root that it would have today.

    Raises:
        CacheFormatError: the place holds no cache, or one of an unknown format version.
        CacheCorruptError: the root is damaged or lost.
        CacheError: the store cannot be read.
    """
    data = read_if_there(store, ROOT_KEY)
    if data is not None:
        return Root.from_bytes(data, f"{store}/{ROOT_KEY}")
    group = read_if_there(store, GROUP_KEY)
    if _copy_in(group, store) is not None:
        raise CacheCorruptError(f"{store} lacks {ROOT_KEY}; `todi-cache repair` restores it from the copy in zarr.json")
    return read_version_1(lambda key: group if key == GROUP_KEY else read_if_there(store, key), str(store))


def read_root_copy(store: Store) -> Root | None:
    """Return the copy of the root that `zarr.json` carries; None where there is none, or a damaged one."""
    return _copy_in(read_if_there(store, GROUP_KEY), store)


def _copy_in(group: bytes | None, store: Store) -> Root | None:
    try:
        values = json.loads(group or b"null")["attributes"][ATTRIBUTE]
        return Root.from_values(values, f"{store}/{GROUP_KEY}") if "manifest" in values else None
    except (ValueError, TypeError, KeyError, RecursionError, CacheCorruptError, CacheFormatError):
        return None


def has_cache(store: Store) -> bool:
    """Whether a place holds a cache or the remains of one."""
    return store.size(ROOT_KEY) is not None or store.size(GROUP_KEY) is not None


def derived_metadata(root: Root) -> Mapping[str, bytes]:
    """Return the metadata objects for other readers of Zarr, by key.

    They follow from the root without its pending parts.
    """
    manifest = root.manifest
    arrays = {
        name: array_metadata(spec, manifest.settings.codec, manifest.num_shards)
        for name, spec in manifest.arrays.items()
    }
    return {
        **{array_key(name): data for name, data in arrays.items()},
        GROUP_KEY: group_metadata({ATTRIBUTE: dataclasses.replace(root, pending=()).values()}, arrays),
    }


def committed_shards(store: Store) -> list[int]:
    """Return the shards that have a commit record, whether or not the root names it."""
    shards = (shard_of(key) for key in store.find(RECORDS_PREFIX) if not is_attempt(key))
    return sorted(shard for shard in shards if shard is not None)


def noted_shards(store: Store) -> list[int]:
    """Return the shards that have a note on an attempt."""
    shards = (shard_of(key) for key in store.find(RECORDS_PREFIX) if is_attempt(key))
    return sorted(shard for shard in shards if shard is not None)


def read_note(store: Store, shard: int) -> Note:
    """Return the note on the last attempt at a shard.

    Raises:
        CacheFormatError, CacheCorruptError: the object is no such note.
        CacheIncompleteError, CacheError: the object is missing or cannot be read.
    """
    key = attempt_key(shard)
    return Note.from_bytes(store.read(key), shard, f"{store}/{key}")


def read_if_there(store: Store, key: str) -> bytes | None:
    """Return an object, or None where there is none."""
    try:
        return store.read(key)
    except CacheIncompleteError:
        return None


def read_object(store: Store, key: str, expected: ObjectSum) -> bytes:
    """Return an object after comparing it with its sum.

    Raises:
        CacheIncompleteError: it is missing.
        CacheCorruptError: its bytes are not those that were written.
        CacheError: it cannot be read.
    """
    data = store.read(key)
    if difference := expected.difference(data):
        raise CacheCorruptError(f"{store}/{key} is damaged: it has {difference}; run `todi-cache verify`")
    return data


def read_tokenizer(store: Store, root: Root) -> str | None:
    """Return the teacher's tokenizer as `tokenizers` reads it, or None where the cache has none."""
    return None if root.tokenizer is None else read_object(store, TOKENIZER_KEY, root.tokenizer).decode()


def read_record(store: Store, manifest: Manifest, shard: int, expected: ObjectSum | None) -> CommitRecord:
    """Return the commit record of a shard; `expected` is its sum in the root, None for a shard of a pending part.

    Raises:
        CacheIncompleteError: the shard has none.
        CacheCorruptError, CacheFormatError: it is damaged, or names other objects than such a shard has.
    """
    key = record_key(shard)
    data = store.read(key) if expected is None else read_object(store, key, expected)
    record = CommitRecord.from_bytes(data, f"{store}/{key}")
    if problem := _record_problem(record, manifest, shard):
        raise CacheFormatError(f"{store}/{key} is not the commit record of shard {shard}: {problem}")
    return record


def _record_problem(record: CommitRecord, manifest: Manifest, shard: int) -> str | None:
    """Return why a record cannot be that of a shard of this cache, or None."""
    rows = {"token": record.num_tokens, "target": record.num_targets}
    expected = {sequences_key(shard), *(spec.object_key(shard) for spec in manifest.arrays.values())}
    if record.shard != shard:
        return f"it describes shard {record.shard}"
    if record.objects.keys() != expected:
        return f"it names {', '.join(sorted(record.objects.keys() ^ expected))}"
    if max(record.num_sequences, *rows.values()) > manifest.settings.shard_tokens or not record.num_sequences:
        return f"it has {record.num_sequences} sequences, {record.num_tokens} tokens, {record.num_targets} targets"
    for spec in manifest.arrays.values():
        sums = len(record.objects[spec.object_key(shard)].chunks)
        if sums % 4 or not spec.chunks_of(rows[spec.axis]) <= sums // 4 <= spec.chunks_per_shard:
            return f"it has {sums} bytes of sums for the chunks of {spec.name}"
    return None


def read_table(store: Store, record: CommitRecord) -> pa.Table:
    """Return the sequence table of a committed shard.

    Raises:
        CacheError: the table cannot be read, or contradicts its commit record.
    """
    key = sequences_key(record.shard)
    return parse_table(read_object(store, key, record.objects[key]), record, f"{store}/{key}")


def open_shard(store: Store, manifest: Manifest, objects: Mapping[str, ObjectSum], name: str, shard: int) -> ShardFile:
    """Return the file of an array in a shard; `objects` are those that the shard's commit record names."""
    spec = manifest.arrays[name]
    key = spec.object_key(shard)
    return ShardFile(store.local(key), spec, manifest.settings.codec, objects[key].chunks)
