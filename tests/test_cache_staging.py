"""Local copies of shards are complete or absent, stay while in use, and respect the size limit."""

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from todi_offline.cache.store import staging
from todi_offline.cache.store.staging import Staging
from todi_offline.errors import CacheError

SIZE = 40
LIMIT_GB = 100e-9


class Source:
    """Makes copies, and notes which."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, name: str) -> tuple[str, int, staging.Fetch]:
        return name, SIZE, lambda path: self._make(name, path)

    def _make(self, name: str, path: Path) -> None:
        self.made.append(name)
        path.write_bytes(name.encode() * SIZE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(code: str, *args: str | Path) -> str:
    """Run a script that has a `Staging` of the folder args[0], and return what it prints."""
    head = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom todi_offline.cache.store.staging import Staging\n"
        f"folder = Path(sys.argv[1])\nstaging = Staging(folder, {LIMIT_GB})\n"
        f"def fill(path): path.write_bytes(b'x' * {SIZE})\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout


def test_a_copy_is_made_once_and_read_by_all(tmp_path: Path) -> None:
    source, folder = Source(), tmp_path / "a" / "b"
    first, second = Staging(folder), Staging(folder)
    paths = {first.copy(*source("x")), second.copy(*source("x")), first.copy(*source("x"))}
    assert (source.made, names(folder)) == (["x"], [f"x.{SIZE}.staged"])
    assert [path.read_bytes() for path in paths] == [b"x" * SIZE]
    assert paths == {pickle.loads(pickle.dumps(first)).copy(*source("x"))}


def test_the_least_recently_used_copies_go(tmp_path: Path) -> None:
    source, copies = Source(), Staging(tmp_path, LIMIT_GB)
    for name in ("a", "b", "a", "c"):
        copies.prepare(*source(name))
    assert names(tmp_path) == ["a.40.staged", "c.40.staged"]
    copies.prepare(*source("b"))
    assert names(tmp_path) == ["b.40.staged", "c.40.staged"]
    assert source.made == ["a", "b", "c", "b"]


def test_a_copy_in_use_stays_and_a_process_uses_those_that_it_was_handed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "HELD", 2)
    source, copies, other = Source(), Staging(tmp_path, LIMIT_GB), Staging(tmp_path, LIMIT_GB)
    copies.copy(*source("a"))
    copies.copy(*source("b"))
    for name in ("c", "d", "e"):
        other.prepare(*source(name))
    assert names(tmp_path) == ["a.40.staged", "b.40.staged", "e.40.staged"]
    copies.copy(*source("a"))
    copies.copy(*source("e"))  # lets go of b
    other.prepare(*source("f"))
    assert names(tmp_path) == ["a.40.staged", "e.40.staged", "f.40.staged"]


def test_a_copy_in_use_stays_when_another_process_fetches_more(tmp_path: Path) -> None:
    copies = Staging(tmp_path, LIMIT_GB)
    path = copies.copy(*Source()("a"))
    assert run(f"for name in 'bcd': staging.prepare(name, {SIZE}, fill)\nprint('done')", tmp_path) == "done\n"
    assert path.read_bytes() == b"a" * SIZE
    assert names(tmp_path) == ["a.40.staged", "d.40.staged"]


def test_a_deleted_copy_stays_readable_while_open_and_is_fetched_again(tmp_path: Path) -> None:
    source, copies = Source(), Staging(tmp_path)
    with copies.copy(*source("a")).open("rb") as file:
        copies.drop("a", SIZE)
        assert (names(tmp_path), file.read()) == ([], b"a" * SIZE)
    copies.drop("a", SIZE)
    copies.copy(*source("a"))
    assert source.made == ["a", "a"]


def test_a_truncated_copy_is_fetched_again(tmp_path: Path) -> None:
    source = Source()
    path = Staging(tmp_path).copy(*source("a"))
    os.truncate(path, SIZE // 2)
    assert Staging(tmp_path).copy(*source("a")).read_bytes() == b"a" * SIZE


def test_other_files_in_the_staging_folder_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x" * 1000)
    copies = Staging(tmp_path, LIMIT_GB)
    for name in "abcd":
        copies.prepare(*Source()(name))
    assert names(tmp_path) == ["c.40.staged", "d.40.staged", "mine"]


def test_two_processes_fetch_the_same_object_once(tmp_path: Path) -> None:
    arrived, release, second = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []

    def slowly(path: Path) -> None:
        made.append(threading.get_ident())
        (second if arrived.is_set() else arrived).set()
        assert release.wait(60)
        path.write_bytes(b"x" * SIZE)

    both = [Staging(tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=staging.copy, args=("x", SIZE, slowly)) for staging in both]
    threads[0].start()
    assert arrived.wait(60)
    threads[1].start()
    assert not second.wait(0.2)
    release.set()
    for thread in threads:
        thread.join(60)  # while both hold it
        assert not thread.is_alive()
    assert (len(made), names(tmp_path)) == (1, ["x.40.staged"])


def test_who_is_killed_while_fetching_leaves_nothing_that_counts(tmp_path: Path) -> None:
    kill = (
        "def half(path):\n    path.write_bytes(b'x' * 20)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"staging.prepare(sys.argv[2], {SIZE}, half)\n"
    )
    for name in ("a", "b"):
        run(kill, tmp_path, name)
    assert names(tmp_path) == ["a.40.fetching", "a.40.part", "b.40.fetching", "b.40.part"]
    copies = Staging(tmp_path, LIMIT_GB)
    assert copies.copy(*Source()("a")).read_bytes() == b"a" * SIZE
    copies.copy(*Source()("c"))
    assert names(tmp_path) == ["a.40.staged", "c.40.staged"]


def test_a_child_keeps_no_locks_of_its_parents_copies(tmp_path: Path) -> None:
    """A data loader forks its workers whenever it likes, and they outlive what goes on just then."""
    code = (
        "read, write = os.pipe()\n"
        "def fork():\n    if os.fork() == 0:\n        os.close(write); os.read(read, 1); os._exit(0)\n"
        "def forking(path):\n    fill(path); fork()\n"
        f"staging.copy('a', {SIZE}, fill); fork(); staging.drop('a', {SIZE})\n"
        f"staging.prepare('b', {SIZE}, forking)\n"
        f"other = Staging(folder, {LIMIT_GB})\n"
        f"for name in 'bcd': other.prepare(name, {SIZE}, fill)\n"
        "print(*sorted(path.name for path in folder.iterdir()))\n"
    )
    assert run(code, tmp_path) == "c.40.staged d.40.staged\n"


def test_a_child_keeps_its_own_copies_when_its_parent_releases_them(tmp_path: Path) -> None:
    code = (
        "import todi_offline.cache.store.staging as module\n"
        "up, down = os.pipe(), os.pipe()\n"
        f"staging.copy('a', {SIZE}, fill)\n"
        "if os.fork() == 0:\n"
        f"    staging.copy('a', {SIZE}, fill); os.write(up[1], b'.'); os.read(down[0], 1)\n"
        f"    for name in 'cd': Staging(folder, {LIMIT_GB}).prepare(name, {SIZE}, fill)\n"
        "    print(*sorted(path.name for path in folder.iterdir())); sys.stdout.flush(); os._exit(0)\n"
        f"os.read(up[0], 1); module.HELD = 0; staging.copy('b', {SIZE}, fill); os.write(down[1], b'.'); os.wait()\n"
    )
    assert run(code, tmp_path) == "a.40.staged d.40.staged\n"


def test_an_object_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    copies = Staging(tmp_path, 39e-9)
    with pytest.raises(CacheError, match=r"takes 40 bytes, but the limit of .* is 3.9e-08 GB; raise the limit"):
        copies.copy(*Source()("a"))
    assert names(tmp_path) == []


def test_a_full_disk_and_a_folder_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match=r"cannot keep a copy in .*: No space left on device; make room there"):
        Staging(tmp_path).prepare("a", SIZE, full)
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot keep a copy in .*file/x: Not a directory; choose another folder"):
        Staging(tmp_path / "file" / "x").copy(*Source()("a"))


def test_copies_lie_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Staging().folder == Path("/somewhere/todi_offline/staging")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/me")
    assert Staging().folder == Path("/me/.cache/todi_offline/staging")
