"""A cache in an object store equals the cache in a folder, and each failure of the store is one line."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from support.fake_cache import manifest, sequence, settings, write_cache
from support.object_store import Fault, Proxy, s3_bucket
from support.tiny_runs import assert_same_weights, trainer_of
from torch.utils.data import DataLoader

import cache_tools.__main__ as tools
import todi_offline.training.trainer
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.store import LocalStore, open_store
from todi_offline.cache.store.base import Store
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.cache.store.staging import Staging
from todi_offline.cache.writer import CacheWriter
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError, CacheLockedError, ConfigError
from todi_offline.teacher.in_transformers import Teacher
from todi_offline.training.run import train
from todi_offline.training.stream import CacheDataset, ShuffledOrder, WindowShuffledOrder, training_order

ONE_TRY: dict[str, Any] = {"retries": {"max_attempts": 0}}


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_bucket() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def captured(proxy: Proxy) -> str:
    """A cache in the bucket, only to be read."""
    return write_cache("s3://bucket/captured", num_shards=2, per_shard=3)


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "todi_offline" / "staging"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """A URL with nothing below it."""
    yield f"memory:/{tmp_path}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteStore:
    if request.param == "memory":
        return RemoteStore(request.getfixturevalue("memory"))
    request.getfixturevalue("proxy")
    return RemoteStore(f"s3://bucket{tmp_path}")


def behind(proxy: Proxy, path: Path, **client: Any) -> RemoteStore:
    """A place in the bucket, by way of a proxy that has forgotten all that was before."""
    proxy.mend()
    options = {"endpoint_url": proxy.endpoint, "config_kwargs": client}
    return RemoteStore(f"s3://bucket{path}", options, Staging(path / "behind"))


def copied(source: Cache, place: str) -> Cache:
    """A cache, copied to another place."""
    target = open_store(place)
    for key in source.store.find():
        target.copy_from(source.store, key, key)
    return open_cache(target)


def assert_same_objects(found: Store, expected: Store) -> None:
    assert found.find() == expected.find()
    for key in expected.find():
        assert found.read(key) == expected.read(key), key


# Objects


def test_a_rewritten_object_gets_a_new_copy(store: RemoteStore) -> None:
    other = RemoteStore(store.url)
    store.write("a", b"old")
    assert (store.local("a").read_bytes(), other.local("a").read_bytes()) == (b"old", b"old")
    other.write("a", b"new")
    assert other.local("a").read_bytes() == b"new"
    assert pickle.loads(pickle.dumps(store)).read("a") == b"new"
    assert RemoteStore(store.url).local("a").read_bytes() == b"new"


def test_an_object_is_copied_within_its_store_and_sent_from_elsewhere(
    proxy: Proxy, tmp_path: Path, memory: str
) -> None:
    first = behind(proxy, tmp_path)
    second = RemoteStore(f"{first.url}/second", first.storage_options, first.staging)
    first.write("x", b"data")
    proxy.mend()
    second.copy_from(first, "x", "y")
    assert ("GET", f"/bucket{tmp_path}/x") not in proxy.requests  # its bytes stay where they are
    folder, other = LocalStore(tmp_path / "folder"), RemoteStore(memory)
    folder.copy_from(second, "y", "z")
    other.copy_from(folder, "z", "a/b")
    first.copy_from(other, "a/b", "c")
    for place, key in ((second, "y"), (folder, "z"), (other, "a/b"), (first, "c")):
        assert place.read(key) == b"data"


# Caches


def test_a_capture_to_an_object_store_is_the_capture_to_a_folder(captured: str, tmp_path: Path) -> None:
    local = open_cache(write_cache(tmp_path / "local", num_shards=2, per_shard=3))
    remote = open_cache(captured)
    assert remote.root == captured
    assert_same_objects(remote.store, local.store)
    for index in range(len(local)):
        for name, values in local[index].targets.arrays().items():
            np.testing.assert_array_equal(remote[index].targets.arrays()[name], values)


def test_the_tools_take_a_url(captured: str, memory: str) -> None:
    result = CliRunner().invoke(tools.cli, ["verify", captured], catch_exceptions=False)
    assert result.output.startswith(f"{captured} is whole: 6 sequences")
    write_cache(memory, num_shards=1, per_shard=2)
    result = CliRunner().invoke(tools.cli, ["inspect", memory, "--rows", "1"], catch_exceptions=False)
    assert "2 sequences" in result.output


def test_an_interrupted_capture_resumes_and_ends_with_the_same_bytes(memory: str, tmp_path: Path) -> None:
    store, chosen = RemoteStore(memory), settings()

    def interrupted() -> None:
        with CacheWriter(store, manifest(chosen, 2, 6)) as writer:
            writer.write_shard(0, [sequence(number, chosen) for number in range(3)])
            store.write("topk_ids/c/1/0", b"part of a shard")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    copies = {key: store.local(key) for key in store.find() if "/c/0" in key}
    write_cache(store, num_shards=2, per_shard=3)
    assert {key: RemoteStore(store.url).local(key) for key in copies} == copies  # not written again
    assert_same_objects(store, LocalStore(write_cache(tmp_path / "local", num_shards=2, per_shard=3)))


def test_where_creation_is_not_exclusive_the_last_to_lock_wins(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(memory)

    def create(key: str, _: bytes) -> bool:
        store.write(key, b"theirs")
        return True

    monkeypatch.setattr(store, "create", create)
    with pytest.raises(CacheLockedError, match="another process"):
        store.lock().__enter__()


def test_a_lock_released_during_the_check_is_not_waited_for(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(memory)
    monkeypatch.setattr(store, "create", lambda key, data: False)
    with pytest.raises(CacheLockedError, match="just released"):
        store.lock().__enter__()


# Local copies


def flip(path: Path) -> None:
    """Damage a copy, and leave its size and its age: a shard index that was read stays good."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_copy_is_fetched_again(memory: str, staging: Path) -> None:
    write_cache(memory, num_shards=1)
    cache = open_cache(memory)
    first = cache[0]
    for path in staging.iterdir():
        flip(path)
    np.testing.assert_array_equal(cache[0].token_ids, first.token_ids)
    np.testing.assert_array_equal(cache[0].targets.logprobs, first.targets.logprobs)
    for path in staging.iterdir():
        flip(path)
    assert verify_cache(memory) == []


def test_a_damaged_object_is_named_after_it_was_fetched_twice(memory: str) -> None:
    write_cache(memory, num_shards=1)
    store = RemoteStore(memory)
    data = bytearray(store.read("topk_ids/c/0/0"))
    data[50] ^= 1
    store.write("topk_ids/c/0/0", bytes(data))
    what = rf"sequence 'fake:0' \(number 0\): fetched twice from {memory}: chunk 0 .*topk_ids-c-0-0\..* is damaged"
    with pytest.raises(CacheCorruptError, match=what):
        open_cache(memory)[0]
    assert [problem.where for problem in verify_cache(memory)] == ["topk_ids/c/0/0"]


def test_a_cache_is_read_and_verified_within_a_limit_that_holds_a_part_of_it(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("todi_offline.cache.store.staging.HELD", 8)
    write_cache(memory, num_shards=6, per_shard=2)
    local = open_cache(write_cache(tmp_path / "local", num_shards=6, per_shard=2))
    limited = RemoteStore(memory, staging=Staging(tmp_path / "copies", limit_gb=10_000e-9))
    cache = open_cache(limited)
    for index in np.random.default_rng(0).permutation(len(cache)).tolist():
        np.testing.assert_array_equal(cache[index].targets.ids, local[index].targets.ids)
    assert verify_cache(limited) == []
    kept = sum(path.stat().st_size for path in (tmp_path / "copies").iterdir())
    assert kept < 20_000 < 40_000 < sum(cache.bytes_by_array.values())


def test_forked_workers_read_from_one_folder_of_copies(captured: str) -> None:
    cache = open_cache(captured)
    order = WindowShuffledOrder(cache.shards, seed=1, window=1, prepare=cache.prepare)
    loader = DataLoader(CacheDataset(cache), 2, sampler=order, num_workers=2, collate_fn=list)
    found = [sequence.token_ids.tolist() for batch in loader for sequence in batch]
    assert found == [cache[index].token_ids.tolist() for index in order]


# Failures


@pytest.mark.parametrize(
    ("fault", "how"),
    [("fail", "read"), ("cut", "read"), ("stall", "read"), ("fail", "local"), ("cut", "local"), ("shorten", "local")],
)
def test_a_request_that_fails_once_is_retried(proxy: Proxy, tmp_path: Path, fault: Fault, how: str) -> None:
    store = behind(proxy, tmp_path, retries={"max_attempts": 1}, read_timeout=1 if fault == "stall" else 60)
    store.write("a", b"x" * 1000)
    proxy.break_next(fault, "GET", "/a")
    found = store.read("a") if how == "read" else store.local("a").read_bytes()
    assert found == b"x" * 1000
    assert [method for method, _ in proxy.requests].count("GET") == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fail", "cannot fetch {store}/a: We encountered an internal error"),
        ("refuse", "cannot fetch {store}/a: Access Denied; check the URL, the credentials and the network"),
        ("cut", "cannot fetch {store}/a: Response payload is not completed"),
        ("shorten", "500 bytes of {store}/a arrived, expected 1,000; run the command again, or check the network"),
    ],
)
def test_a_permanent_failure_is_one_line_and_leaves_nothing(
    proxy: Proxy, tmp_path: Path, fault: Fault, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = behind(proxy, tmp_path, **ONE_TRY)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    store.write("a", b"x" * 1000)
    proxy.break_next(fault, "GET", "/a", times=100)
    with pytest.raises(CacheError, match=message.format(store=store)) as caught:
        store.local("a")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "behind").iterdir()) == []
    proxy.mend()
    assert store.local("a").read_bytes() == b"x" * 1000


def test_a_creation_whose_answer_is_lost_has_succeeded(proxy: Proxy, tmp_path: Path) -> None:
    store = behind(proxy, tmp_path, retries={"max_attempts": 1})
    proxy.break_next("lose", "PUT", "/a")
    store.create("a", b"mine")
    assert proxy.requests[:2] == [("PUT", f"/bucket{tmp_path}/a")] * 2
    assert store.read("a") == b"mine"


def test_an_object_that_vanishes_while_training_is_named(captured: str, tmp_path: Path) -> None:
    cache = copied(open_cache(captured), f"s3://bucket{tmp_path}")
    RemoteStore(cache.root).delete("topk_ids/c/0/0")
    what = (
        rf"sequence 'fake:0' \(number 0\): {cache.root} lacks topk_ids/c/0/0; `todi-cache verify` lists every missing"
    )
    with pytest.raises(CacheIncompleteError, match=what):
        cache[0]
    assert [problem.where for problem in verify_cache(cache.store)] == ["topk_ids/c/0/0"]


def test_a_capture_that_cannot_write_can_be_resumed(proxy: Proxy, tmp_path: Path) -> None:
    store = behind(proxy, tmp_path, **ONE_TRY)
    proxy.break_next("refuse", "PUT", "/commits/000000.json")
    with pytest.raises(CacheError, match=rf"cannot write {store}/commits/000000.json: .*; check the URL, the cred"):
        write_cache(store, num_shards=1, per_shard=2)
    write_cache(store, num_shards=1, per_shard=2)
    assert_same_objects(store, LocalStore(write_cache(tmp_path / "local", num_shards=1, per_shard=2)))


def test_a_missing_bucket_server_or_key_is_one_line(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": ONE_TRY}
    missing = "The specified bucket does not exist; create the bucket, or correct the URL"
    attempts: list[tuple[str, Callable[[], Any]]] = [
        (f"cannot look for s3://nobucket/c/cache.json: {missing}", lambda: open_cache("s3://nobucket/c")),
        (f"cannot list s3://nobucket/c/: {missing}", lambda: open_store("s3://nobucket/c").find()),
        (f"cannot write s3://nobucket/c/a: {missing}", lambda: open_store("s3://nobucket/c").write("a", b"")),
        ("Could not connect to the endpoint URL", lambda: open_cache(RemoteStore("s3://bucket/c", nowhere))),
    ]
    for message, attempt in attempts:
        with pytest.raises(CacheError, match=message):
            attempt()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CacheError, match=r"cannot look for s3://bucket/c/cache.json: Unable to locate credentials"):
        open_cache(RemoteStore("s3://bucket/c", {"config_kwargs": {"connect_timeout": 9}}))


def test_a_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, url, extra in (("s3fs", "s3://bucket/c", "s3"), ("gcsfs", "gs://bucket/c", "gcs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, extra, raising=False)
        with pytest.raises(ConfigError, match=rf"cannot open {url}: .*; pip install 'todi-offline\[{extra}\]'"):
            open_store(url)
    with pytest.raises(ConfigError, match="cannot open nonsense://x: Protocol not known: nonsense"):
        open_store("nonsense://x")


def test_a_url_that_pathlib_has_shortened_is_no_folder() -> None:
    with pytest.raises(ConfigError, match="s3:/bucket/c looks like a URL with one slash; give the URL as a string"):
        open_store(Path("s3://bucket/c"))


def test_a_folder_needs_no_package_and_may_be_a_url(tmp_path: Path) -> None:
    for place in (f"file://{tmp_path}", tmp_path, str(tmp_path)):
        store = open_store(place)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path
    code = (
        "import sys, todi_offline, cache_tools.__main__, todi_offline.cache.store.remote\n"
        "sys.exit(bool({'fsspec', 's3fs', 'botocore'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Both stages


def test_capture_writes_to_a_url_and_training_reads_from_it(
    teacher: Teacher, examples: Examples, cache: Cache, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(teacher, examples, memory, k=16, tail_samples=4, encoding="f16", shard_tokens=4096, codec="fast")
    remote = open_cache(memory)
    assert_same_objects(remote.store, cache.store)
    assert isinstance(training_order(remote, 0), WindowShuffledOrder)
    monkeypatch.setattr(
        todi_offline.training.trainer, "training_order", lambda cache, seed: ShuffledOrder(len(cache), seed)
    )
    models = []
    for number, place in enumerate((cache, remote)):
        trainer = trainer_of(tmp_path / str(number), place, max_steps=2)
        trainer.train()
        models.append(trainer.model)
    assert_same_weights(*models)


def test_training_keeps_its_copies_in_the_staging_folder(
    cache: Cache, heldout: Cache, memory: str, tmp_path: Path, staging: Path
) -> None:
    place, held = copied(cache, memory).root, copied(heldout, f"{memory}/heldout").root
    from support.tiny import tiny_tokenizer
    from support.tiny_models import llama

    summary = train(
        llama(seed=1), place, tmp_path / "run", tokenizer=tiny_tokenizer(), eval_cache=held, max_steps=1, use_cpu=True,
        staging=tmp_path / "copies", staging_gb=0.01,
    )  # fmt: skip
    assert summary.after["kd"] > 0
    kept = {path.name.partition("-")[0] for path in (tmp_path / "copies").iterdir()}
    assert kept == {*cache.manifest.arrays}
    assert not staging.exists()
