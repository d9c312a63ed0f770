"""Objects of an object store are fetched many at once, ahead of their use; those of a folder are not fetched."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.fake_cache import write_cache

from todi_offline.cache.check.diff import compare_caches
from todi_offline.cache.check.summary import summarise_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.export import export_cache
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.fetching import ahead, at_once, fetch
from todi_offline.cache.reader import open_cache, read_all
from todi_offline.cache.store import LocalStore
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.cache.stored import StoredCache
from todi_offline.errors import CacheError, CacheIncompleteError
from todi_offline.pages.cache_page import cache_page

PATIENCE = 60  # seconds; only a failing test waits so long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("folder"), num_shards=4, per_shard=3)


@pytest.fixture
def remote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the same cache in an object store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source, target = LocalStore(folder), RemoteStore(f"memory:/{tmp_path}/cache")
    for key in source.find():
        target.copy_from(source, key, key)
    yield target.url
    fsspec.filesystem("memory").store.clear()


def test_tasks_run_at_once_and_their_results_keep_their_order() -> None:
    meeting = threading.Barrier(3)

    def square(number: int) -> int:
        meeting.wait(PATIENCE)  # none goes on before all three have come
        return number**2

    assert at_once(square, [1, 2, 3]) == [1, 4, 9]


def test_the_next_item_is_worked_on_while_the_caller_uses_one(remote: str) -> None:
    has_begun = [threading.Event() for _ in range(5)]

    def begin(number: int) -> int:
        has_begun[number].set()
        return number

    results = ahead([RemoteStore(remote)], begin, range(5))
    assert next(results) == 0
    assert has_begun[1].wait(PATIENCE)
    assert has_begun[2].wait(PATIENCE)
    assert not has_begun[3].is_set()
    assert list(results) == [1, 2, 3, 4]


def test_an_error_is_raised_in_its_place(remote: str) -> None:
    def invert(number: int) -> float:
        return 1 / number

    results = ahead([RemoteStore(remote)], invert, [2, 1, 0, 4])
    assert (next(results), next(results)) == (0.5, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_for_folders_all_work_is_done_by_the_caller(folder: Path) -> None:
    threads = list(ahead([LocalStore(folder)], lambda _: threading.get_ident(), range(3)))
    assert threads == [threading.get_ident()] * 3


def test_an_object_that_cannot_be_fetched_is_left_to_its_reader(remote: str) -> None:
    store = RemoteStore(remote)
    fetch(store, ["zarr.json", "missing"])
    assert store.local("zarr.json").read_bytes() == store.read("zarr.json")
    with pytest.raises(CacheIncompleteError):
        store.local("missing")


def test_a_shard_that_is_read_again_and_again_is_fetched_ahead_once(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(StoredCache, "prepare", lambda _, shard: asked.append(shard))
    cache = open_cache(remote)
    numbers = [0, 11, 1, 10, 2, 5]
    expected = [cache[number].token_ids.tolist() for number in numbers]
    assert [sequence.token_ids.tolist() for sequence in read_all(cache, numbers)] == expected
    assert sorted(asked) == [0, 1, 3]


def subset(url: str, out: Path) -> None:
    cache = open_cache(url)
    subset_cache(cache, str(out / "subset"), np.ones(len(cache), np.bool_), {}, k=2)


OPERATIONS: dict[str, Callable[[str, Path], Any]] = {
    "verify": lambda url, out: verify_cache(url),
    "inspect": lambda url, out: summarise_cache(open_cache(url)),
    "view": lambda url, out: cache_page(open_cache(url)),
    "diff": lambda url, out: compare_caches(open_cache(url), open_cache(url)),
    "subset": subset,
    "merge": lambda url, out: merge_caches([url], str(out / "merged")),
    "export": lambda url, out: export_cache(open_cache(url), out / "table.parquet"),
    "iteration": lambda url, out: list(open_cache(url)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_on_whole_caches_fetches_objects_before_it_reads_them(
    operation: str, remote: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: set[str] = set()
    unexpected: list[str] = []
    prepare, local = RemoteStore.prepare, RemoteStore.local

    def preparing(store: RemoteStore, key: str) -> None:
        prepare(store, key)
        fetched.add(key)

    def reading(store: RemoteStore, key: str) -> Path:
        if key not in fetched:
            unexpected.append(key)
        return local(store, key)

    monkeypatch.setattr(RemoteStore, "prepare", preparing)
    monkeypatch.setattr(RemoteStore, "local", reading)
    OPERATIONS[operation](remote, tmp_path)
    assert unexpected == []
    arrays = open_cache(folder).manifest.arrays.values()
    assert fetched >= {spec.object_key(shard) for spec in arrays for shard in range(4)}


def test_a_shard_is_written_with_several_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3)
    create = RemoteStore.create

    def meet(store: RemoteStore, key: str, data: bytes) -> bool:
        if key.startswith(("topk_ids/c/", "token_ids/c/", "label_logprob/c/")):
            meeting.wait(PATIENCE)
        return create(store, key, data)

    monkeypatch.setattr(RemoteStore, "create", meet)
    try:
        url = write_cache(f"memory:/{tmp_path}/cache", num_shards=2, per_shard=2)  # type: ignore[arg-type]
        assert verify_cache(url) == []
    finally:
        fsspec.filesystem("memory").store.clear()


def test_where_one_object_cannot_be_written_the_shard_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RemoteStore.create

    def fail(store: RemoteStore, key: str, data: bytes) -> bool:
        if key.startswith("topk_ids/"):
            raise CacheError("the store is full")
        return create(store, key, data)

    url = f"memory:/{tmp_path}/cache"
    monkeypatch.setattr(RemoteStore, "create", fail)
    try:
        with pytest.raises(CacheError, match="the store is full"):
            write_cache(url, num_shards=1, per_shard=2)  # type: ignore[arg-type]
        assert RemoteStore(url).find("commits/") == []
    finally:
        fsspec.filesystem("memory").store.clear()
