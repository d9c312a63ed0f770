"""Sums of objects in, commit records and the seal out, and back.

The order of a commit is: every object of a shard, each safe on its medium; then its record. A shard without a record
does not exist. The seal is the record of the whole cache.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import google_crc32c

from todi_offline.cache.store import Store
from todi_offline.errors import CacheCorruptError, CacheFormatError, CacheIncompleteError

SEAL_KEY = "sealed.json"
RECORDS_PREFIX = "commits/"


@dataclass(frozen=True, slots=True)
class ObjectSum:
    """Size and CRC-32C of an object and, where it is a Zarr shard, of each of its chunks.

    Every chunk of a shard ends in its own CRC-32C, and what ends so has the same CRC-32C whatever it is: the one of
    the object tells how its chunks lie, but not one shard from another with chunks of the same sizes.
    """

    num_bytes: int
    crc32c: int
    chunks: bytes = b""
    """u32 in little-endian order for each chunk, as they stand in the object."""

    @classmethod
    def of(cls, data: bytes, chunks: bytes = b"") -> "ObjectSum":
        """Measure an object."""
        return cls(len(data), google_crc32c.value(data), chunks)

    @classmethod
    def from_json(cls, values: Any) -> "ObjectSum":
        """Read what `to_json` returned; whatever else it is given is a ValueError or a TypeError."""
        num_bytes, crc32c, *chunks = values
        return cls(
            _count(num_bytes), _count(crc32c), b"".join(base64.b64decode(text, validate=True) for text in chunks)
        )

    def to_json(self) -> list[int | str]:
        """Return it as JSON knows it; chunks in base64."""
        return [self.num_bytes, self.crc32c, *([base64.b64encode(self.chunks).decode()] if self.chunks else [])]


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A finished shard: how much it holds, and the sum of each of its objects."""

    shard: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    content: str
    """Hash over the content keys of its sequences, in order."""
    objects: Mapping[str, ObjectSum]


@dataclass(frozen=True, slots=True)
class Seal:
    """A finished cache: its number of shards, and the sum of every record and piece of metadata."""

    num_shards: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    objects: Mapping[str, ObjectSum]


def to_bytes(record: CommitRecord | Seal) -> bytes:
    """Return a record as JSON."""
    values = {name: getattr(record, name) for name in record.__slots__}
    values["objects"] = {key: found.to_json() for key, found in sorted(record.objects.items())}
    return (json.dumps(values, indent=1) + "\n").encode()


def read_record(store: Store, key: str) -> CommitRecord:
    """Read the commit record of a shard."""
    return CommitRecord(**_read_fields(store, key, CommitRecord))


def committed_shards(store: Store) -> list[int]:
    """Return the shards that have a commit record."""
    stems = (key.removeprefix(RECORDS_PREFIX).removesuffix(".json") for key in store.find(RECORDS_PREFIX))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def read_seal(store: Store) -> Seal:
    """Read the seal of a cache.

    Raises:
        CacheIncompleteError: the cache is not sealed.
        CacheFormatError: the seal cannot be read, or contradicts itself.
    """
    if store.size(SEAL_KEY) is None:
        raise CacheIncompleteError(
            f"{store} is not sealed: its capture has not finished; run the same `todi capture` again to go on, "
            "or open it with allow_unsealed (--allow-unsealed) to use the part that is committed"
        )
    seal = Seal(**_read_fields(store, SEAL_KEY, Seal))
    num_records = sum(key.startswith(RECORDS_PREFIX) for key in seal.objects)
    if seal.num_shards != num_records:
        raise CacheFormatError(f"{store}/{SEAL_KEY} says {seal.num_shards} shards and names {num_records} records")
    return seal


def read_object(store: Store, key: str, expected: ObjectSum | None = None) -> bytes:
    """Read a small object and compare it with its sum.

    Raises:
        CacheIncompleteError: it is missing.
        CacheCorruptError: its bytes are not those that were written.
    """
    data = store.read(key)
    if expected is not None and ObjectSum.of(data) != expected:
        raise CacheCorruptError(
            f"{store}/{key} is not what was written: {len(data)} bytes with crc32c {google_crc32c.value(data):08x}, "
            f"expected {expected.num_bytes} bytes with {expected.crc32c:08x}"
        )
    return data


def write_object(store: Store, key: str, data: bytes, chunks: bytes = b"") -> ObjectSum:
    """Write an object whole, and return its sum; `chunks` are those of its chunks.

    Raises:
        CacheError: the disk is full or cannot be written; nothing is left behind.
    """
    store.write(key, data)
    return ObjectSum.of(data, chunks)


def _read_fields(store: Store, key: str, kind: type) -> dict[str, Any]:
    """Read a record's fields; a cache is data, so nothing in it is believed before it is checked."""
    try:
        values = json.loads(read_object(store, key))
        if values.keys() != set(kind.__slots__):  # type: ignore[attr-defined]
            raise ValueError(f"its fields are {list(values)!r:.200}")
        objects = {_inner_key(name): ObjectSum.from_json(entry) for name, entry in values.pop("objects").items()}
        counts = {name: value if name == "content" else _count(value) for name, value in values.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CacheFormatError(f"{store}/{key} is no record of a cache: {error}") from error
    return {**counts, "objects": objects}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r:.50} is no count")
    return value


def _inner_key(key: str) -> str:
    outside = key.startswith("/") or ".." in PurePosixPath(key).parts or "\\" in key
    if outside or not key.isprintable():
        raise ValueError(f"{key!r} leaves the cache's folder")
    return key
