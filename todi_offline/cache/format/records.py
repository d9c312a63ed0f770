"""Sums of objects in, commit records out, and back.

A commit has an order: first every object of a shard, each safe on its medium; then the record. A shard without a
record does not exist.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c

from todi_offline.cache.format.names import is_own
from todi_offline.errors import CacheFormatError

MAX_RECORD_BYTES = 2**26
_MAX_COUNT = 2**53


@dataclass(frozen=True, slots=True)
class ObjectSum:
    """Size and CRC-32C of an object and, for a Zarr shard, the CRC-32C of each of its chunks.

    Every chunk of a shard ends in its own CRC-32C, and the CRC-32C of data that ends in its own CRC-32C is a constant.
    So the sum of a whole shard cannot tell its chunks from other chunks of the same sizes; the sums of the chunks can.
    """

    num_bytes: int
    crc32c: int
    chunks: bytes = b""
    """u32 in little-endian order for each chunk that is stored: the first ones of the shard."""

    @classmethod
    def of(cls, data: bytes, chunks: bytes = b"") -> "ObjectSum":
        """Measure an object."""
        return cls(len(data), google_crc32c.value(data), chunks)

    @classmethod
    def from_json(cls, values: Any) -> "ObjectSum":
        """Read the values that `to_json` returned; raise ValueError or TypeError for other values."""
        num_bytes, crc32c, *chunks = values
        return cls(count(num_bytes), count(crc32c), b"".join(base64.b64decode(text, validate=True) for text in chunks))

    def to_json(self) -> list[int | str]:
        """Return size, CRC-32C and, where there are chunks, their sums in base64."""
        return [self.num_bytes, self.crc32c, *([base64.b64encode(self.chunks).decode()] if self.chunks else [])]

    def difference(self, data: bytes) -> str | None:
        """Return how the bytes of an object differ from the measured ones, or None."""
        found = ObjectSum.of(data)
        if (found.num_bytes, found.crc32c) == (self.num_bytes, self.crc32c):
            return None
        return (
            f"{found.num_bytes} bytes with crc32c {found.crc32c:08x}, expected {self.num_bytes} bytes with "
            f"{self.crc32c:08x}"
        )


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
    """By key: the sequence table, and one object an array."""

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["objects"] = {key: found.to_json() for key, found in sorted(self.objects.items())}
        return (json.dumps(values, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "CommitRecord":
        """Read the bytes that `to_bytes` wrote.

        Raises:
            CacheFormatError: the bytes are no commit record.
        """
        try:
            return cls(**_read_fields(json.loads(data)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CacheFormatError(f"{where} is not a commit record: {error}") from error


def count(value: Any) -> int:
    """Return a value that is a count; raise ValueError for any other."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{value!r:.50} is not a count")
    return value


def _read_fields(values: Any) -> dict[str, Any]:
    """Check the fields of a record; a cache may come from anywhere, so every value is checked."""
    if values.keys() != set(CommitRecord.__slots__):
        raise ValueError(f"its fields are {list(values)!r:.200}")
    if not isinstance(values["content"], str):
        raise ValueError("its content is not a hash")
    objects = {_own_key(key): ObjectSum.from_json(entry) for key, entry in values.pop("objects").items()}
    counts = {name: value if name == "content" else count(value) for name, value in values.items()}
    return {**counts, "objects": objects}


def _own_key(key: str) -> str:
    if not is_own(key):
        raise ValueError(f"{key!r:.200} is not the key of an object of a cache")
    return key
