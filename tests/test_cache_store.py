"""Objects of a folder are whole or not there, and one process writes at a time."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from todi_offline.cache import store
from todi_offline.cache.store import LocalStore
from todi_offline.cache.store.locks import FolderLock
from todi_offline.errors import CacheError, CacheLockedError


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    LocalStore(tmp_path).write("object", b"old")
    monkeypatch.setattr(*((store.os, "fsync") if name == "fsync" else (Path, "open")), full)
    with pytest.raises(CacheError, match="No space left on device; what is committed is safe"):
        LocalStore(tmp_path).write("object", b"new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"object": b"old"}


def test_an_object_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheError, match=r"cannot write .*file/object: "):
        LocalStore(tmp_path).write("file/object", b"data")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_another_store_survives_the_deletion_of_the_original(tmp_path: Path) -> None:
    first, second = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    first.write("x/y", b"data")
    for _ in range(2):  # the second time over itself
        second.copy_from(first, "x/y", "z/0")
    assert second.local("z/0").samefile(first.local("x/y"))
    first.delete("x/y")
    assert (first.find(), second.find(), second.read("z/0")) == ([], ["z/0"], b"data")
    assert not (tmp_path / "a/x").exists()
    with pytest.raises(CacheError, match=r"cannot copy .*a/x/y to .*b/z/1: No such file"):
        second.copy_from(first, "x/y", "z/1")
    assert second.find() == ["z/0"]


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    first.write("x", b"data")
    monkeypatch.setattr(Path, "hardlink_to", full)
    second.copy_from(first, "x", "y")
    assert second.read("y") == b"data"
    assert not second.local("y").samefile(first.local("x"))


def test_keys_are_all_objects_that_begin_so(tmp_path: Path) -> None:
    folder = LocalStore(tmp_path)
    for key in ("a/1", "a/b/2", "ab", "c"):
        folder.write(key, b"")
    assert folder.find() == ["a/1", "a/b/2", "ab", "c"]
    assert (folder.find("a"), folder.find("a/"), folder.find("d/")) == (["a/1", "a/b/2", "ab"], ["a/1", "a/b/2"], [])


def test_what_is_there_is_not_created_again(tmp_path: Path) -> None:
    folder = LocalStore(tmp_path)
    folder.create("a", b"mine")
    with pytest.raises(CacheLockedError, match="was written by another process meanwhile"):
        folder.create("a", b"yours")
    assert folder.read("a") == b"mine"


def test_a_lock_is_taken_once_and_leaves_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(CacheLockedError, match=f"is being written by process {os.getpid()} on "):
            FolderLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the file, the first removes it, a third makes another: the second must not go on."""
    first, third = FolderLock(tmp_path), FolderLock(tmp_path)
    first.__enter__()
    real = store.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        third.__enter__()
        real(descriptor, operation)

    monkeypatch.setattr(store.fcntl, "flock", late)
    with pytest.raises(CacheLockedError, match="was let go by another process just now; run the same command again"):
        FolderLock(tmp_path).__enter__()
    with pytest.raises(CacheLockedError, match="is being written by"):
        FolderLock(tmp_path).__enter__()
    third.__exit__(None, None, None)


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=r"cannot write in .*nowhere: No such file or directory"):
        FolderLock(tmp_path / "nowhere").__enter__()
    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(CacheError, match=r"cannot lock .*: No space left on device"):
        FolderLock(tmp_path).__enter__()
    monkeypatch.undo()
    with FolderLock(tmp_path):
        pass
