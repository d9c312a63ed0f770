"""Writing a cache: what is refused, what survives, and what bytes come out."""

import os
import re
from pathlib import Path

import pytest
from support.fake_cache import manifest, sequence, settings, write_cache

from todi_offline.cache.format.names import record_key
from todi_offline.cache.format.records import CommitRecord, ObjectSum, to_bytes
from todi_offline.cache.objects import read_record
from todi_offline.cache.planning import plan_shards
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import (
    CacheError,
    CacheFormatError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigError,
    DataError,
)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_two_writings_give_the_same_bytes_and_leave_nothing_else(tmp_path: Path) -> None:
    first, second = write_cache(tmp_path / "a"), write_cache(tmp_path / "b")
    assert contents(first) == contents(second)
    assert not [name for name in contents(first) if name.endswith(".tmp") or "lock" in name]


def test_a_cache_holds_no_path_and_no_host_name(tmp_path: Path) -> None:
    host = os.uname().nodename.encode()
    for name, data in contents(write_cache(tmp_path / "somewhere")).items():
        assert b"somewhere" not in data, name
        assert len(host) < 4 or host not in data, name


def test_writing_goes_on_after_the_last_committed_shard(tmp_path: Path) -> None:
    whole = contents(write_cache(tmp_path / "whole", num_shards=3))
    chosen = settings()
    with CacheWriter(tmp_path / "part", manifest(chosen, 3, 36)) as writer:
        writer.write_shard(0, [sequence(number, chosen) for number in range(12)])
    assert not writer.sealed
    with CacheWriter(tmp_path / "part", manifest(chosen, 3, 36)) as writer:
        assert writer.missing_shards() == [1, 2]
    write_cache(tmp_path / "part", num_shards=3)
    assert contents(tmp_path / "part") == whole


def test_a_cache_begun_with_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=re.escape("settings.k: 6 in the cache, 7 now")):
        write_cache(tmp_path / "cache", k=7)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        write_cache(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_of_other_folders_is_refused_but_what_an_interrupted_creation_left_is_not(tmp_path: Path) -> None:
    (tmp_path / "photos" / "photos").mkdir(parents=True)
    (tmp_path / "photos" / "photos" / "1.jpg").touch()
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        write_cache(tmp_path / "photos")
    (tmp_path / "cache" / "token_ids").mkdir(parents=True)
    (tmp_path / "cache" / "token_ids" / "zarr.json.tmp").write_text("{")
    (tmp_path / "cache" / "zarr.json.tmp").write_text("{")
    assert len(open_cache(write_cache(tmp_path / "cache"))) == 24


@pytest.mark.parametrize("found", ["{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_a_zarr_group_that_is_no_cache_is_left_alone(tmp_path: Path, found: str) -> None:
    (tmp_path / "zarr.json").write_text(found)
    with pytest.raises(CacheFormatError, match="holds no todi_offline manifest"):
        write_cache(tmp_path)
    assert contents(tmp_path) == {"zarr.json": found.encode()}


def test_metadata_that_were_lost_are_written_anew_when_a_capture_goes_on(tmp_path: Path) -> None:
    whole = contents(write_cache(tmp_path / "whole"))
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "topk_ids/zarr.json").unlink()
    assert contents(write_cache(root)) == whole


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot create .*choose another folder"):
        write_cache(tmp_path / "file" / "cache")


def test_a_cache_with_missing_shards_cannot_be_sealed(tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path / "cache", manifest(settings(), 2, 24)) as writer,
        pytest.raises(CacheIncompleteError, match=re.escape("shards [0, 1] are not committed")),
    ):
        writer.seal()


def test_a_shard_whose_object_is_gone_cannot_be_sealed(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "topk_ids/c/1/0").unlink()
    with (
        CacheWriter(root, manifest(settings(), 2, 24)) as writer,
        pytest.raises(CacheIncompleteError, match=r"topk_ids/c/1/0 has no bytes, expected \d+"),
    ):
        writer.seal()


def test_records_are_believed_in_nothing(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    record = read_record(LocalStore(root), record_key(0))
    path = root / record_key(0)
    text = path.read_text()
    for damaged, why in {
        text.replace('"topk_ids/c/0/0"', '"../../etc/passwd"'): "leaves the cache's folder",
        text.replace('"topk_ids/c/0/0"', '"/etc/passwd"'): "leaves the cache's folder",
        text.replace('"num_tokens"', '"number"'): "its fields are",
        text.replace(f'"num_tokens": {record.num_tokens}', '"num_tokens": -1'): "is no count",
        text.replace(f'"num_tokens": {record.num_tokens}', f'"num_tokens": {10**30}'): "is no count",
        text[:-10]: "is no record of a cache",
        "[]": "is no record of a cache",
        "[" * 5_000: "is no record of a cache",
    }.items():
        path.write_text(damaged)
        with pytest.raises(CacheFormatError, match=why):
            read_record(LocalStore(root), record_key(0))
    path.write_text(text)
    assert to_bytes(record) == text.encode()
    assert isinstance(record, CommitRecord)
    assert all(isinstance(value, ObjectSum) for value in record.objects.values())


def test_the_plan_fills_shards_in_order_and_never_splits_a_sequence() -> None:
    plan = plan_shards([3, 4, 5, 2, 8, 1], 8)
    assert [list(shard.examples) for shard in plan] == [[0, 1], [2, 3], [4], [5]]
    with pytest.raises(DataError, match="example 1 has 9 tokens, more than the 8"):
        plan_shards([1, 9], 8)
    with pytest.raises(DataError, match="there is no example to capture"):
        plan_shards([], 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "expected k >= 1"),
        ({"temperatures": ()}, "expected at least one"),
        ({"temperatures": (1.0, -2.0)}, "each above 0"),
        ({"temperatures": (1.0, 1.0)}, "expected each once"),
        ({"tail_temperature": 3.0}, "not one of the temperatures"),
        ({"shard_tokens": 1000}, "expected a multiple of 4096"),
        ({"encoding": "f8"}, "expected one of f16, q8"),
    ],
)
def test_settings_that_no_capture_could_honour_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)
