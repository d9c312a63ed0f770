"""Objects are compared with their sums, and records are checked before they are believed."""

import json
from pathlib import Path

import pytest
from support.fake_cache import write_cache

from todi_offline.cache.format.records import ObjectSum, read_seal, write_object
from todi_offline.cache.objects import committed_shards, read_object
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError


def test_an_object_is_read_back_and_compared_with_its_sum(tmp_path: Path) -> None:
    written = write_object(LocalStore(tmp_path), "a/b/c", b"123456789")
    assert written == ObjectSum(9, 0xE3069283)  # the check value of CRC-32C, RFC 3720
    assert read_object(LocalStore(tmp_path), "a/b/c", written) == b"123456789"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["c"]
    with pytest.raises(CacheCorruptError, match="9 bytes with crc32c e3069283, expected 8 bytes with 00000000"):
        read_object(LocalStore(tmp_path), "a/b/c", ObjectSum(8, 0))
    with pytest.raises(CacheIncompleteError, match="lacks a/d"):
        read_object(LocalStore(tmp_path), "a/d")
    with pytest.raises(CacheError, match=r"cannot read .*a/b: Is a directory"):
        read_object(LocalStore(tmp_path), "a/b")


def test_a_seal_that_says_more_shards_than_it_names_is_not_believed(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    seal = json.loads((root / "sealed.json").read_text())
    (root / "sealed.json").write_text(json.dumps(seal | {"num_shards": 10**15}))
    for read in (read_seal, open_cache):
        with pytest.raises(CacheFormatError, match=f"says {10**15} shards and names 2 records"):
            read(LocalStore(root))


def test_committed_shards_are_those_with_a_record(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "commits/notes.json").write_text("")
    (root / "commits/000002.json.tmp").write_text("")
    assert committed_shards(LocalStore(root)) == [0, 1]
    assert committed_shards(LocalStore(tmp_path)) == []
