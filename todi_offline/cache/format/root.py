"""The root of a cache: a dataclass in, the object `cache.json` out, and back.

The root holds the manifest of a cache and the sums of its commit records, which in turn name all other objects. An
object without a name is not part of the cache. The root is replaced in one step, so a reader finds the cache as it was
before a capture or as it is afterwards. The metadata for other readers of Zarr is derived from the root.
"""

import json
from dataclasses import dataclass
from typing import Any

import google_crc32c

from todi_offline.cache.format.layout import FORMAT_VERSION
from todi_offline.cache.format.manifest import Manifest, Part, read_parts
from todi_offline.cache.format.records import ObjectSum
from todi_offline.config import to_dict
from todi_offline.errors import CacheCorruptError, CacheFormatError

MAX_ROOT_BYTES = 2**28
_FIELDS = {"manifest", "commits", "pending", "tokenizer", "crc32c"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """The state of a cache at an instant."""

    manifest: Manifest
    """With the finished parts."""
    commits: tuple[ObjectSum | None, ...] = ()
    """The sum of the commit record of every shard of the finished parts; None for a lost shard."""
    pending: tuple[Part, ...] = ()
    """The parts that a writer has begun and not finished; they are not in the cache yet."""
    tokenizer: ObjectSum | None = None
    """The sum of `tokenizer.json`, where there is one."""

    @property
    def lost_shards(self) -> list[int]:
        """The shards of finished parts that a capture must write again."""
        return [shard for shard, commit in enumerate(self.commits) if commit is None]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts: the finished ones, then the pending ones."""
        return (*self.manifest.parts, *self.pending)

    def values(self) -> dict[str, Any]:
        """Return the root as JSON-able values that end in their own checksum."""
        values = {
            "manifest": self.manifest.to_json(),
            "commits": [None if commit is None else commit.to_json() for commit in self.commits],
            "pending": [to_dict(part) for part in self.pending],
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_json(),
        }
        return values | {"crc32c": _checksum(values)}

    def to_bytes(self) -> bytes:
        """Return the root as its object."""
        return _to_bytes(self.values())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Root":
        """Read the bytes that `to_bytes` wrote.

        Raises:
            CacheCorruptError: the bytes have changed.
            CacheFormatError: the root has another format version, or contradicts itself.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CacheCorruptError(f"{where} is damaged: {error}; {_MEND}") from error
        root = cls.from_values(values, where)
        if _to_bytes(values) != data:
            raise CacheCorruptError(f"{where} is damaged: its bytes are not those that were written; {_MEND}")
        return root

    @classmethod
    def from_values(cls, values: Any, where: str) -> "Root":
        """Read the values that `values` returned; raises as `from_bytes`."""
        if not isinstance(values, dict) or not isinstance(values.get("manifest"), dict):
            raise CacheFormatError(f"{where} is not the root of a cache; name the folder that `todi capture` wrote")
        _require_version(values["manifest"], where)
        body = {name: value for name, value in values.items() if name != "crc32c"}
        if values.keys() != _FIELDS or values["crc32c"] != _checksum(body):
            raise CacheCorruptError(f"{where} is damaged: its checksum does not match; {_MEND}")
        manifest = Manifest.from_json(values["manifest"], where)
        try:
            commits = tuple(None if entry is None else ObjectSum.from_json(entry) for entry in values["commits"])
            tokenizer = None if values["tokenizer"] is None else ObjectSum.from_json(values["tokenizer"])
        except (ValueError, TypeError) as error:
            raise CacheFormatError(f"{where} has invalid checksums: {error}") from error
        if len(commits) != manifest.num_shards:
            raise CacheFormatError(
                f"{where} names {len(commits)} commit records, but its parts have {manifest.num_shards} shards"
            )
        return cls(
            manifest=manifest, commits=commits, pending=read_parts(values["pending"], where), tokenizer=tokenizer
        )


def is_of_other_version(data: bytes) -> bool:
    """Whether a root has a right checksum and another format version."""
    try:
        values = json.loads(data)
        body = {name: value for name, value in values.items() if name != "crc32c"}
        is_other: bool = values["manifest"]["format_version"] != FORMAT_VERSION
        return is_other and bool(values["crc32c"] == _checksum(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


_MEND = "run `todi-cache repair`: it restores the root from the copy in zarr.json"


def _require_version(manifest: dict[str, Any], where: str) -> None:
    """Refuse another version first: its other fields may follow other rules."""
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CacheFormatError(
            f"{where} has format version {manifest.get('format_version')!r:.20}; this release reads version "
            f"{FORMAT_VERSION} here: install a newer release of todi_offline"
        )


def _checksum(values: dict[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(values, separators=(",", ":")).encode()))


def _to_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
