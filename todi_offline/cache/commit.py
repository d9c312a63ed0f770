"""Bytes in, objects out that are either whole or not there; commit records, the seal, the lock.

The order of a commit is: every object of a shard, each synced to the disk; then its record, written under another
name and renamed. A shard without a record does not exist. The seal is the record of the whole cache.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import google_crc32c

from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError, CacheLockedError

SEAL_KEY = "sealed.json"
LOCK_KEY = ".lock"
TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True, slots=True)
class ObjectSum:
    """Size and CRC-32C of an object."""

    num_bytes: int
    crc32c: int

    @classmethod
    def of(cls, data: bytes) -> "ObjectSum":
        """Measure an object."""
        return cls(len(data), google_crc32c.value(data))


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
    values["objects"] = {key: [o.num_bytes, o.crc32c] for key, o in sorted(record.objects.items())}
    return (json.dumps(values, indent=1) + "\n").encode()


def read_record(root: Path, key: str) -> CommitRecord:
    """Read the commit record of a shard."""
    return CommitRecord(**_read_fields(root, key, CommitRecord))


def committed_shards(root: Path) -> list[int]:
    """Return the shards that have a commit record."""
    stems = (path.stem for path in (root / "commits").glob("*.json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def read_seal(root: Path) -> Seal:
    """Read the seal of a cache.

    Raises:
        CacheIncompleteError: the cache is not sealed.
        CacheFormatError: the seal cannot be read, or contradicts itself.
    """
    if not (root / SEAL_KEY).exists():
        raise CacheIncompleteError(
            f"{root} is not sealed: its capture has not finished; run the same `todi capture` again to go on, "
            "or open it with allow_unsealed (--allow-unsealed) to use the part that is committed"
        )
    seal = Seal(**_read_fields(root, SEAL_KEY, Seal))
    num_records = sum(key.startswith("commits/") for key in seal.objects)
    if seal.num_shards != num_records:
        raise CacheFormatError(f"{root / SEAL_KEY} says {seal.num_shards} shards and names {num_records} records")
    return seal


def read_object(root: Path, key: str, expected: ObjectSum | None = None) -> bytes:
    """Read a small object and compare it with its sum.

    Raises:
        CacheIncompleteError: it is missing.
        CacheCorruptError: its bytes are not those that were written.
    """
    try:
        data = (root / key).read_bytes()
    except FileNotFoundError as error:
        raise CacheIncompleteError(f"{root} lacks {key}; `todi-cache verify` lists all that is missing") from error
    except OSError as error:
        raise CacheError(f"cannot read {root / key}: {error.strerror}") from error
    if expected is not None and ObjectSum.of(data) != expected:
        raise CacheCorruptError(
            f"{root / key} is not what was written: {len(data)} bytes with crc32c {google_crc32c.value(data):08x}, "
            f"expected {expected.num_bytes} bytes with {expected.crc32c:08x}"
        )
    return data


def write_object(root: Path, key: str, data: bytes) -> ObjectSum:
    """Write an object whole: under a temporary name, synced, then renamed.

    Raises:
        CacheError: the disk is full or cannot be written; nothing is left behind.
    """
    path = root / key
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CacheError(
            f"cannot write {path}: {error.strerror}; what is committed is safe; mend that and run it again"
        ) from error
    return ObjectSum.of(data)


class CacheLock:
    """Holds a cache folder for one writing process; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, root: Path) -> None:
        """Name the folder; entering the context takes the lock."""
        self._path = root / LOCK_KEY
        self._descriptor = -1

    def __enter__(self) -> "CacheLock":
        """Take the lock.

        Raises:
            CacheLockedError: another process holds it.
        """
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheError(f"cannot write in {self._path.parent}: {error.strerror}; mend that first") from error
        try:
            self._lock()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _lock(self) -> None:
        folder = self._path.parent
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_current():
                raise CacheLockedError(f"{folder} was let go by another process just now; run the same command again")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"
            raise CacheLockedError(f"{folder} is being written by {holder}; wait or stop it") from error
        except OSError as error:
            raise CacheError(f"cannot lock {folder}: {error.strerror}; mend that first") from error

    def _is_current(self) -> bool:
        """Whether the locked file still has its name: its last holder removes it, and a third may have made another."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the lock's file and let go of it."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _read_fields(root: Path, key: str, kind: type) -> dict[str, Any]:
    """Read a record's fields; a cache is data, so nothing in it is believed before it is checked."""
    try:
        values = json.loads(read_object(root, key))
        if values.keys() != set(kind.__slots__):  # type: ignore[attr-defined]
            raise ValueError(f"its fields are {', '.join(values)}")
        objects = {_inner_key(name): ObjectSum(*map(_count, entry)) for name, entry in values.pop("objects").items()}
        counts = {name: value if name == "content" else _count(value) for name, value in values.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CacheFormatError(f"{root / key} is no record of a cache: {error}") from error
    return {**counts, "objects": objects}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no count")
    return value


def _inner_key(key: str) -> str:
    if key.startswith("/") or ".." in PurePosixPath(key).parts or "\\" in key or "\0" in key:
        raise ValueError(f"{key!r} leaves the cache's folder")
    return key


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
