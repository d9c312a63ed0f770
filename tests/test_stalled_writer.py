"""A writer that stalled while another one took over notices it, and changes nothing.

The first writer is stopped before one operation after another: of the disk, or of requests to the object store. Then a
second one takes the place over, writes every shard that is not committed, with other rows, and seals the cache. Then
the first one goes on.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from support import fake_cache
from support.disk import Watch
from support.fake_cache import manifest, settings
from support.object_store import Proxy, s3_bucket

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.names import record_key
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore, Store
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.cache.store.staging import Staging
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheLockedError

SETTINGS = settings(k=2, tail_samples=0, codec="fast")
SHARDS = 2
FOREVER = 10_000.0
FEW = {"folder": 13, "memory": 11, "s3": 61}
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
MANY = {"folder": 1, "memory": 1, "s3": 13}  # a program on S3 is some hundreds of requests


@pytest.fixture(scope="module")
def bucket() -> Iterator[Proxy]:
    with s3_bucket() as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing for real, and make a sequence once."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(fake_cache, "sequence", functools.lru_cache(fake_cache.sequence))


@dataclasses.dataclass
class Place:
    """Somewhere that a first writer works and a second one takes over."""

    first: Store
    second: Store
    watch: Callable[[Callable[[], None]], contextlib.AbstractContextManager[Any]]
    """Calls something before every operation of the first writer."""


class Steps:
    """A store, with something before each of its methods; one method runs at a time."""

    def __init__(self, store: RemoteStore) -> None:
        self.before: Callable[[], None] = lambda: None
        self._store = store
        self._one_at_a_time = threading.RLock()

    def __str__(self) -> str:
        return str(self._store)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("read", "write", "create", "swap", "delete", "size", "find", "copy_from"):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._one_at_a_time:
                self.before()
                return found(*args, **options)

        return call


MakePlace = Callable[[str], Place]


@pytest.fixture(params=["folder", "memory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_place(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Iterator[MakePlace]:
    if kind == "s3":
        request.getfixturevalue("bucket")
    make = {"folder": in_folder, "memory": in_memory, "s3": in_bucket}[kind]
    yield lambda name: make(tmp_path, name)
    fsspec.filesystem("memory").store.clear()


def in_folder(tmp_path: Path, name: str) -> Place:
    """A folder, and every operation that changes it but renaming: that counts as one with the look before it.

    No file system compares and renames in one step. But the lock of a folder ends with its process: only where
    somebody deletes it by hand can there be a stalled writer at all.
    """
    root = tmp_path / name
    root.mkdir()

    def watch(before: Callable[[], None]) -> Watch:
        return Watch(root, lambda asked: None if asked.kind in ("sync", "rename") else before())

    return Place(LocalStore(root), LocalStore(root), watch)


def in_memory(tmp_path: Path, name: str) -> Place:
    """Memory, and every method of the store: fsspec's memory cannot compare and replace in one step."""
    url = f"memory:/{tmp_path}/{name}"
    first = Steps(remote(url, tmp_path, FOREVER))
    second = remote(url, tmp_path, 0.01)
    return Place(first, second, lambda before: mock.patch.object(first, "before", before))  # type: ignore[arg-type]


def in_bucket(tmp_path: Path, name: str) -> Place:
    """A bucket, and every request."""
    url = f"s3://bucket{tmp_path}/{name}"
    first = remote(url, tmp_path, FOREVER)

    def watch(before: Callable[[], None]) -> contextlib.AbstractContextManager[Any]:
        real = first._at

        def at(*args: Any) -> Any:
            before()
            return real(*args)

        return mock.patch.object(first, "_at", at)

    return Place(first, remote(url, tmp_path, 0.05), watch)


def remote(url: str, tmp_path: Path, lease_seconds: float) -> RemoteStore:
    return RemoteStore(url, staging=Staging(tmp_path / "staging"), lease_seconds=lease_seconds)


def write_all(store: Store, first_number: int, entered: Callable[[], None] = lambda: None) -> None:
    """Write the cache with sequences of these numbers."""
    with CacheWriter(store, manifest(SETTINGS, SHARDS, SHARDS)) as writer:
        entered()
        for shard in writer.missing_shards():
            writer.write_shard(shard, [fake_cache.sequence(first_number + shard, SETTINGS)])
        writer.seal()


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.find() if key != ".lock" and not key.endswith(".tmp")}


def take_over(place: Place) -> dict[str, bytes]:
    """Take the place over from a writer that is thought to be gone, finish the cache, and return its objects."""
    if isinstance(place.second, LocalStore):
        (place.second.root / ".lock").unlink()
    write_all(place.second, 100)
    return contents(place.second)


class Stall:
    """Has the place taken over just before an operation of the first writer, and notes how many there were."""

    def __init__(self, place: Place, at: int) -> None:
        self.count = 0
        self.sealed: dict[str, bytes] = {}
        self.is_late = False
        """Whether the first writer had committed all its shards by then."""
        self._place, self._at, self._is_counting = place, at, False
        self._one_at_a_time = threading.RLock()  # the objects of a shard are sent by several threads

    def begin(self) -> None:
        self._is_counting = True

    def __call__(self) -> None:
        with self._one_at_a_time:
            self.count += self._is_counting
            if self._is_counting and self.count == self._at:
                self._is_counting = False
                self.is_late = all(self._place.second.size(record_key(shard)) is not None for shard in range(SHARDS))
                self.sealed = take_over(self._place)
                self._is_counting = True


def stalled(place: Place, at: int) -> tuple[Stall, CacheLockedError | None]:
    stall, caught = Stall(place, at), None
    with place.watch(stall):
        try:
            write_all(place.first, 0, stall.begin)
        except CacheLockedError as error:
            caught = error
    return stall, caught


def assert_unharmed(place: Place, stall: Stall, caught: CacheLockedError | None, at: int) -> None:
    assert contents(place.second) == stall.sealed, at
    assert [problem for problem in verify_cache(place.second) if not problem.is_note] == [], at
    assert len(open_cache(place.second)) == SHARDS
    assert caught is not None or stall.is_late, at
    if caught is not None and not isinstance(place.second, LocalStore):  # there the lock is gone with its holder
        assert f"process {os.getpid()} on " in str(caught), at
    for word in ("taken over", "written by", "has changed"):
        if caught is not None and word in str(caught):
            return
    assert caught is None, str(caught)


@pytest.mark.parametrize("steps", [FEW, pytest.param(MANY, marks=SLOW)], ids=["few", "many"])
def test_a_writer_that_wakes_after_another_has_sealed_harms_nothing(
    make_place: MakePlace, kind: str, steps: dict[str, int]
) -> None:
    undisturbed, caught = stalled(make_place("undisturbed"), -1)
    assert caught is None
    assert undisturbed.count > 30
    for at in range(1, undisturbed.count + 1, steps[kind]):
        place = make_place(str(at))
        assert_unharmed(place, *stalled(place, at), at)


@pytest.mark.parametrize("steps", [FEW, pytest.param(MANY, marks=SLOW)], ids=["few", "many"])
def test_a_stalled_writer_does_not_replace_objects_of_an_earlier_attempt(
    make_place: MakePlace, kind: str, steps: dict[str, int]
) -> None:
    """Objects without a record make way, but only while the lock is held."""

    def begun(name: str) -> Place:
        place = make_place(name)
        with CacheWriter(place.second, manifest(SETTINGS, SHARDS, SHARDS)) as writer:
            for shard in range(SHARDS):
                writer.write_shard(shard, [fake_cache.sequence(50 + shard, SETTINGS)])
                place.second.delete(record_key(shard))
        return place

    undisturbed, caught = stalled(begun("undisturbed"), -1)
    assert caught is None
    for at in range(1, undisturbed.count + 1, steps[kind]):
        place = begun(str(at))
        assert_unharmed(place, *stalled(place, at), at)
