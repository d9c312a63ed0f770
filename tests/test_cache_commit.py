"""Objects are whole or not there, records are checked before they are believed, and one process writes at a time."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_cache import write_cache

from todi_offline.cache import commit
from todi_offline.cache.commit import CacheLock, ObjectSum, committed_shards, read_object, read_seal, write_object
from todi_offline.cache.reader import open_cache
from todi_offline.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheIncompleteError,
    CacheLockedError,
)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_object_is_read_back_and_compared_with_its_sum(tmp_path: Path) -> None:
    written = write_object(tmp_path, "a/b/c", b"123456789")
    assert written == ObjectSum(9, 0xE3069283)  # the check value of CRC-32C, RFC 3720
    assert read_object(tmp_path, "a/b/c", written) == b"123456789"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["c"]
    with pytest.raises(CacheCorruptError, match="9 bytes with crc32c e3069283, expected 8 bytes with 00000000"):
        read_object(tmp_path, "a/b/c", ObjectSum(8, 0))
    with pytest.raises(CacheIncompleteError, match="lacks a/d"):
        read_object(tmp_path, "a/d")
    with pytest.raises(CacheError, match=r"cannot read .*a/b: Is a directory"):
        read_object(tmp_path, "a/b")


@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_object(tmp_path, "object", b"old")
    monkeypatch.setattr(*((commit.os, "fsync") if name == "fsync" else (Path, "open")), full)
    with pytest.raises(CacheError, match="No space left on device; what is committed is safe"):
        write_object(tmp_path, "object", b"new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"object": b"old"}


def test_an_object_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheError, match=r"cannot write .*file/object: "):
        write_object(tmp_path, "file/object", b"data")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_seal_that_says_more_shards_than_it_names_is_not_believed(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    seal = json.loads((root / "sealed.json").read_text())
    (root / "sealed.json").write_text(json.dumps(seal | {"num_shards": 10**15}))
    for read in (read_seal, open_cache):
        with pytest.raises(CacheFormatError, match=f"says {10**15} shards and names 2 records"):
            read(root)


def test_committed_shards_are_those_with_a_record(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "commits/notes.json").write_text("")
    (root / "commits/000002.json.tmp").write_text("")
    assert committed_shards(root) == [0, 1]
    assert committed_shards(tmp_path) == []


def test_a_lock_is_taken_once_and_leaves_nothing(tmp_path: Path) -> None:
    with CacheLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(CacheLockedError, match=f"is being written by process {os.getpid()} on "):
            CacheLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the file, the first removes it, a third makes another: the second must not go on."""
    first, third = CacheLock(tmp_path), CacheLock(tmp_path)
    first.__enter__()
    real = commit.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        third.__enter__()
        real(descriptor, operation)

    monkeypatch.setattr(commit.fcntl, "flock", late)
    with pytest.raises(CacheLockedError, match="was let go by another process just now; run the same command again"):
        CacheLock(tmp_path).__enter__()
    with pytest.raises(CacheLockedError, match="is being written by"):
        CacheLock(tmp_path).__enter__()
    third.__exit__(None, None, None)


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=r"cannot write in .*nowhere: No such file or directory"):
        CacheLock(tmp_path / "nowhere").__enter__()
    monkeypatch.setattr(commit.os, "pwrite", full)
    with pytest.raises(CacheError, match=r"cannot lock .*: No space left on device"):
        CacheLock(tmp_path).__enter__()
    monkeypatch.undo()
    with CacheLock(tmp_path):
        pass
