"""Objects in a folder are complete or absent, and only one process writes at a time."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.disk import Operation, Watch, after_power_loss

from todi_offline.cache.store import LocalStore, locks
from todi_offline.cache.store.locks import FolderLock, Holder
from todi_offline.errors import CacheError, CacheLockedError


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def without_links(*_: Any) -> Any:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    LocalStore(tmp_path).write("object", b"old")
    monkeypatch.setattr(*((os, "fsync") if name == "fsync" else (Path, "open")), full)
    with pytest.raises(CacheError, match="No space left on device; committed work is safe"):
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
    with pytest.raises(CacheError, match=r"cannot write .*b/z/1: No such file"):
        second.copy_from(first, "x/y", "z/1")
    assert second.find() == ["z/0"]


def test_an_object_that_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    first.write("x", b"data")
    monkeypatch.setattr(Path, "hardlink_to", without_links)
    second.copy_from(first, "x", "y")
    assert second.read("y") == b"data"
    assert not second.local("y").samefile(first.local("x"))


def test_an_object_of_a_killed_process_is_durable_once_found(tmp_path: Path) -> None:
    """It was killed between giving an object its name and syncing the folder."""

    class Killed(BaseException):
        pass

    def before(asked: Operation) -> None:
        if asked.kind == "sync" and asked.path == "a/x" and len(watch.log) > 3:
            raise Killed

    with Watch(tmp_path, before) as watch, pytest.raises(Killed):
        LocalStore(tmp_path / "a").create("x/y", b"data")
    with Watch(tmp_path) as after:
        assert LocalStore(tmp_path / "a").create("x/y", b"data")
    disk = after_power_loss([*watch.log, *after.log], "unsynced is lost", np.random.default_rng(0))
    assert disk == {"a/x/y": b"data"}


def test_a_lock_is_taken_once_and_leaves_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        found = Holder.from_bytes((tmp_path / ".lock").read_bytes())
        assert found is not None
        assert found.process == os.getpid()
        with pytest.raises(CacheLockedError, match=f"is being written by process {os.getpid()} on "):
            FolderLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


ORPHAN = """
import os, signal, sys
from pathlib import Path
from todi_offline.cache.store.locks import FolderLock

ready, say = os.pipe()
with FolderLock(Path(sys.argv[1])):
    if os.fork() == 0:
        os.write(say, b"x")
        sys.stdin.read()  # until the test ends
        os._exit(0)
    os.read(ready, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_that_outlives_the_killed_holder_of_a_lock_does_not_hold_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path)], stdin=subprocess.PIPE)
    assert holder.wait() == -signal.SIGKILL
    with FolderLock(tmp_path):
        pass
    assert holder.stdin is not None
    holder.stdin.close()


def test_a_lock_file_that_its_holder_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the file, the first removes it, a third makes another: the second must not go on."""
    first, third = FolderLock(tmp_path), FolderLock(tmp_path)
    first.__enter__()
    real = locks.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        third.__enter__()
        real(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with pytest.raises(CacheLockedError, match="just released"):
        FolderLock(tmp_path).__enter__()
    with pytest.raises(CacheLockedError, match="is being written by"):
        FolderLock(tmp_path).__enter__()
    third.__exit__(None, None, None)


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=r"cannot write in .*nowhere: No such file or directory"):
        FolderLock(tmp_path / "nowhere").__enter__()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match=r"cannot lock .*: No space left on device"):
        FolderLock(tmp_path).__enter__()
    monkeypatch.undo()
    with FolderLock(tmp_path):
        pass
