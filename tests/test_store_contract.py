"""The contract of every store: the same tests on a folder, in memory, and on an S3 server."""

import dataclasses
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.object_store import Proxy, s3_bucket

from todi_offline.cache.store import LocalStore, Store
from todi_offline.cache.store.base import read_limit
from todi_offline.cache.store.locks import Holder, require_held
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.cache.store.staging import Staging
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError, CacheLockedError

LEASE = 0.2
KINDS = ("folder", "memory", "s3")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Proxy]:
    with s3_bucket() as proxy:
        yield proxy


Open = Callable[[str], Store]


@pytest.fixture(params=KINDS)
def open_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the place of this name, as another process would."""
    if request.param == "s3":
        request.getfixturevalue("bucket")

    def opened(name: str) -> Store:
        if request.param == "folder":
            return LocalStore(tmp_path / name)
        root = f"memory:/{tmp_path}" if request.param == "memory" else f"s3://bucket{tmp_path}"
        return RemoteStore(f"{root}/{name}", staging=Staging(tmp_path / "staging"), lease_seconds=LEASE)

    yield opened
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def store(open_place: Open) -> Store:
    return open_place("a")


def in_threads(number: int, work: Callable[[int], Any]) -> list[Any]:
    """Do something in several threads at once."""
    together, found = threading.Barrier(number), [None] * number

    def run(index: int) -> None:
        together.wait()
        found[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# Objects


def test_an_object_has_the_bytes_that_were_written_last(store: Store) -> None:
    assert isinstance(store, Store)
    for data in (b"old", b"", b"\0new" * 100):
        store.write("x/y/z", data)
        assert (store.read("x/y/z"), store.size("x/y/z")) == (data, len(data))
        assert store.local("x/y/z").read_bytes() == data


def test_an_object_that_is_not_there_is_missing(store: Store) -> None:
    store.write("x/y", b"data")
    for key in ("x/z", "z"):
        assert store.size(key) is None
        with pytest.raises(CacheIncompleteError, match=f"lacks {key}"):
            store.read(key)
    assert store.size("x") is None


@pytest.mark.parametrize(
    ("key", "limit"),
    [
        (".lock", 2**14),
        ("commits/000000.json", 2**26),
        ("cache.json", 2**28),
        ("zarr.json", 2**28),
        ("sequences/000000.parquet", 2**30),
        ("tokenizer.json", 2**30),
        ("anything", 2**30),
    ],
)
def test_every_kind_of_object_has_a_limit(key: str, limit: int) -> None:
    assert read_limit(key) == limit


@pytest.mark.parametrize("key", [".lock", "commits/000000.json", "x"])
def test_no_more_than_the_limit_is_read(store: Store, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    limits = {".lock": 30, "commits/000000.json": 20, "x": 10}
    for module in ("local", "remote"):
        monkeypatch.setattr(f"todi_offline.cache.store.{module}.read_limit", limits.__getitem__)
    store.write(key, b"1" * limits[key])
    assert len(store.read(key)) == len(store.read(key, limits[key])) == limits[key]
    store.write(key, b"1" * (limits[key] + 1))
    assert len(store.read(key, limits[key] + 1)) == limits[key] + 1
    for limit in (None, limits[key], 0):
        with pytest.raises(CacheCorruptError, match=r"more than the .* bytes that are expected|expected at most"):
            store.read(key, limit)


def test_an_existing_object_is_not_created_again_except_with_the_same_bytes(store: Store) -> None:
    assert store.create("x/y", b"mine")
    assert store.create("x/y", b"mine")
    assert not store.create("x/y", b"yours")
    assert not store.create("x/y", b"mine too")
    assert store.read("x/y") == b"mine"


def test_one_of_several_concurrent_creations_succeeds(open_place: Open) -> None:
    found = in_threads(4, lambda index: open_place("a").create("x", str(index).encode()))
    assert [str(index).encode() for index in range(4) if found[index]] == [open_place("a").read("x")]
    assert all(in_threads(3, lambda _: open_place("a").create("y", b"the same")))


def test_an_object_is_swapped_if_it_still_holds_the_old_bytes(store: Store) -> None:
    assert not store.swap("x", b"new", b"")
    assert store.size("x") is None
    store.write("x", b"old")
    assert not store.swap("x", b"new", b"other")
    assert not store.swap("x", b"new", b"older")
    assert store.read("x") == b"old"
    assert store.swap("x", b"newer", b"old")
    assert store.swap("x", b"newer", b"old")  # a request whose answer was lost is sent again
    assert not store.swap("x", b"last", b"old")
    assert store.read("x") == b"newer"


def test_a_deleted_object_is_gone_and_may_be_deleted_again(store: Store) -> None:
    store.write("x/y", b"data")
    store.write("x/z", b"data")
    for _ in range(2):
        store.delete("x/y")
    assert store.find() == ["x/z"]
    assert store.create("x/y", b"other")


def test_keys_are_found_by_prefix(store: Store) -> None:
    assert store.find() == []
    for key in ("a/1", "a/b/2", "ab", "c"):
        store.write(key, b"")
    assert store.find() == ["a/1", "a/b/2", "ab", "c"]
    assert (store.find("a"), store.find("a/"), store.find("d/")) == (["a/1", "a/b/2", "ab"], ["a/1", "a/b/2"], [])


@pytest.mark.parametrize("source_kind", ["same", "folder", "memory"])
def test_a_copy_creates_only_missing_objects(open_place: Open, tmp_path: Path, source_kind: str) -> None:
    target = open_place("a")
    sources = {
        "same": lambda: open_place("b"),
        "folder": lambda: LocalStore(tmp_path / "source"),
        "memory": lambda: RemoteStore(f"memory:/{tmp_path}/source", staging=Staging(tmp_path / "staging")),
    }
    source = sources[source_kind]()
    source.write("x", b"data")
    source.write("other", b"more")
    assert target.copy_from(source, "x", "y/z")
    assert target.copy_from(source, "x", "y/z")
    assert not target.copy_from(source, "other", "y/z")
    assert target.read("y/z") == b"data"
    source.delete("x")
    assert target.read("y/z") == b"data"
    with pytest.raises(CacheError):
        target.copy_from(source, "x", "y/w")
    assert target.find() == ["y/z"]


def test_a_store_that_cannot_tell_says_so(open_place: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails, or a server that refuses: no object passes for a missing one."""
    store = open_place("a")
    store.write("x", b"data")
    breakage = OSError(errno.EIO, os.strerror(errno.EIO))

    def fail(*_: Any, **__: Any) -> Any:
        raise breakage

    if isinstance(store, LocalStore):
        monkeypatch.setattr(Path, "stat", fail)
    else:
        for name in ("info", "cat_file", "find", "pipe_file"):
            monkeypatch.setattr(store._open()[0], name, fail)
    attempts: list[Callable[[], Any]] = [
        lambda: store.size("x"),
        lambda: store.size("nothing"),
        lambda: store.read("x"),
        lambda: store.create("y", b"data"),
        lambda: store.swap("x", b"new", b"data"),
    ]
    for attempt in attempts:
        with pytest.raises(CacheError, match="Input/output error") as caught:
            attempt()
        assert not isinstance(caught.value, CacheIncompleteError | CacheCorruptError)


# The lock


def test_one_writer_at_a_time_and_the_second_is_told_who(open_place: Open) -> None:
    first, second = open_place("a"), open_place("a")
    with first.lock() as held:
        require_held(second, held.token)
        with pytest.raises(CacheLockedError, match=f"process {os.getpid()} on "):
            second.lock().__enter__()
        require_held(first, held.token)
    with second.lock() as held_then:
        assert held_then.token != held.token
        with pytest.raises(CacheLockedError, match=f"taken over by process {os.getpid()} on "):
            require_held(first, held.token)
    assert first.find() == []
    with pytest.raises(CacheLockedError, match="taken over by another process"):
        require_held(first, held.token)


def test_one_of_several_concurrent_locks_succeeds(open_place: Open) -> None:
    locks = [open_place("a").lock() for _ in range(3)]
    assert len(taken_by(locks)) == 1


def taken_by(locks: list[Any]) -> list[Any]:
    """Return the locks that could be taken, all at once."""

    def take(index: int) -> Any:
        try:
            return locks[index].__enter__()
        except CacheLockedError:
            return None

    taken = [lock for lock in in_threads(len(locks), take) if lock is not None]
    for lock in taken:
        lock.__exit__(None, None, None)
    return taken


def holder(**changes: Any) -> bytes:
    """The lock of another process."""
    return dataclasses.replace(Holder.of_this_process(), **changes).to_bytes()


@pytest.fixture
def dead() -> bytes:
    """The lock of a process of this machine that is no more."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return holder(process=child)


ELSEWHERE = {"machine": "another", "host": "host7", "process": 12}


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(open_place: Open, dead: bytes) -> None:
    store = open_place("a")
    store.write(".lock", dead)
    started = time.monotonic()
    with store.lock() as held:
        require_held(store, held.token)
    assert time.monotonic() - started < 10 * LEASE
    with open_place("a").lock() as held:  # the next one finds a lock that was let go of, or none
        require_held(store, held.token)


@pytest.mark.parametrize(
    "found",
    [holder(**ELSEWHERE), b"", b"\xff", b"[1]", b'{"host": "host7"}'],
    ids=["another machine", "empty", "no text", "a list", "old"],
)
def test_a_lock_that_stands_still_for_a_lease_is_taken_over(open_place: Open, found: bytes) -> None:
    store = open_place("a")
    store.write(".lock", found)
    with store.lock() as held:
        require_held(store, held.token)
        assert json.loads(store.read(".lock"))["process"] == os.getpid()


@pytest.fixture
def leased(open_place: Open) -> Store:
    """A place whose lock is a lease: a folder's lock is held by the kernel."""
    store = open_place("a")
    if isinstance(store, LocalStore):
        pytest.skip("the lock of a folder is no lease")
    return store


def test_a_lock_that_is_renewed_is_left_alone(leased: Store) -> None:
    ended = threading.Event()

    def renew() -> None:
        number = 0
        while not ended.wait(LEASE / 8):
            number += 1
            leased.write(".lock", holder(**ELSEWHERE, renewed=number, token="t"))

    leased.write(".lock", holder(**ELSEWHERE, token="t"))
    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(CacheLockedError, match="process 12 on host7"):
            leased.lock().__enter__()
    finally:
        ended.set()
        renewing.join()
    assert Holder.from_bytes(leased.read(".lock")).token == "t"  # type: ignore[union-attr]


def test_a_holder_renews_its_lock_and_keeps_its_token(leased: Store) -> None:
    with leased.lock() as held:
        first = leased.read(".lock")
        deadline = time.monotonic() + 50 * LEASE
        while leased.read(".lock") == first and time.monotonic() < deadline:
            time.sleep(LEASE / 10)
        assert leased.read(".lock") != first
        require_held(leased, held.token)


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "elsewhere"])
def test_one_of_several_concurrent_takeovers_succeeds(
    bucket: Proxy, tmp_path: Path, dead: bytes, is_dead: bool
) -> None:
    """On S3, where replacing is one conditional request."""
    place = f"s3://bucket{tmp_path}/a"
    stores = [RemoteStore(place, staging=Staging(tmp_path / "staging"), lease_seconds=LEASE) for _ in range(4)]
    stores[0].write(".lock", dead if is_dead else holder(**ELSEWHERE))
    locks = [store.lock() for store in stores]
    (winner,) = taken_by(locks)
    assert Holder.from_bytes(stores[0].read(".lock")).token == winner.token  # type: ignore[union-attr]


def test_a_holder_that_was_taken_over_leaves_the_lock_to_its_successor(leased: Store) -> None:
    with leased.lock() as held:
        leased.write(".lock", holder(**ELSEWHERE, token="theirs"))
        with pytest.raises(CacheLockedError, match="taken over by process 12 on host7"):
            require_held(leased, held.token)
    assert Holder.from_bytes(leased.read(".lock")).token == "theirs"  # type: ignore[union-attr]


def test_a_successor_leaves_its_name_for_the_one_that_it_took_over_from(leased: Store, dead: bytes) -> None:
    leased.write(".lock", dead)
    with leased.lock():
        pass
    left = Holder.from_bytes(leased.read(".lock"))
    assert left is not None
    assert (left.process, left.has_ended) == (os.getpid(), True)
    with pytest.raises(CacheLockedError, match=f"process {os.getpid()} on "):
        require_held(leased, "of the dead one")
