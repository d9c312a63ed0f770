"""The root, the commit records and the object names: their contents, their refusals, and format 1."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cache import edit_root, manifest, write_cache
from support.fake_cache import settings as cache_settings

from todi_offline.cache.format.layout import ENCODINGS, array_specs
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import (
    array_key,
    attempt_key,
    is_attempt,
    is_own,
    is_temporary,
    record_key,
    sequences_key,
    shard_of,
    temporary_key,
)
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.root import Root
from todi_offline.cache.format.version_1 import read_version_1
from todi_offline.cache.objects import (
    committed_shards,
    derived_metadata,
    noted_shards,
    read_object,
    read_record,
    read_root,
)
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError

SMALL: dict[str, Any] = {"num_shards": 2, "per_shard": 1, "codec": "fast"}


# Sums


def test_an_object_is_compared_with_its_sum(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a/b/c", b"123456789")
    written = ObjectSum.of(b"123456789")
    assert written == ObjectSum(9, 0xE3069283)  # the check value of CRC-32C, RFC 3720
    assert read_object(store, "a/b/c", written) == b"123456789"
    with pytest.raises(CacheCorruptError, match="9 bytes with crc32c e3069283, expected 8 bytes with 00000000"):
        read_object(store, "a/b/c", ObjectSum(8, 0))
    with pytest.raises(CacheIncompleteError, match="lacks a/d"):
        read_object(store, "a/d", written)
    with pytest.raises(CacheError, match="Is a directory"):
        read_object(store, "a/b", written)


# Names


@given(st.integers(0, 2**31 - 1), st.sampled_from(ENCODINGS))
@settings(max_examples=50, deadline=None)
def test_every_key_that_a_cache_makes_is_its_own_and_names_its_shard(shard: int, encoding: str) -> None:
    specs = array_specs(cache_settings(encoding=encoding), 300)
    assert is_attempt(attempt_key(shard))
    for key in (
        record_key(shard),
        attempt_key(shard),
        sequences_key(shard),
        *(spec.object_key(shard) for spec in specs.values()),
    ):
        assert (shard_of(key), is_own(key)) == (shard, True)
        assert is_temporary(temporary_key(key, "0123456789abcdef"))
    for name in specs:
        assert (shard_of(array_key(name)), is_own(array_key(name))) == (None, True)


@pytest.mark.parametrize(
    "key",
    [
        "commits/0.json",
        "commits/0000000.json",
        "commits/٠٠٠٠٠٠.json",
        "commits/9999999999.json",
        "commits/000000.json.bak",
        "commits/0.attempt",
        "sequences/000000.attempt",
        "backup/commits/000000.json",
        "sequences/000000.json",
        "topk_ids/c/00/0",
        "topk_ids/c/0/1",
        "other/c/0/0",
        "other/zarr.json",
        "topk_ids/c/0/0\n",
        "README.md",
        ".git/HEAD",
        "cache.json.tmp",
        "cache.json.0123456789abcdeg.tmp",
    ],
)
def test_no_other_key_is(key: str) -> None:
    assert (shard_of(key), is_own(key), is_temporary(key)) == (None, False, False)


def test_a_foreign_file_with_a_temporary_name_is_foreign() -> None:
    assert not is_temporary(temporary_key("thesis.tex", "0123456789abcdef"))


def test_committed_shards_are_those_with_a_record(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", **SMALL)
    for name in ("0.json", "notes.json", "000002.json.tmp"):
        (root / "commits" / name).write_text("")
    (root / attempt_key(5)).write_text("")
    assert (committed_shards(LocalStore(root)), noted_shards(LocalStore(root))) == ([0, 1], [5])
    assert committed_shards(LocalStore(tmp_path)) == []


# Commit records


RECORD_DAMAGE: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text.replace('"topk_ids/c/0/0"', '"../../etc/passwd"'), "not the key of an object"),
    (lambda text: text.replace('"topk_ids/c/0/0"', '"/etc/passwd"'), "not the key of an object"),
    (lambda text: text.replace('"topk_ids/c/0/0"', '"topk_ids/c/1/0"'), "not the commit record of shard 0"),
    (lambda text: text.replace('"shard": 0', '"shard": 1'), "describes shard 1"),
    (lambda text: text.replace('"num_tokens"', '"number"'), "its fields are"),
    (lambda text: re.sub(r'"num_tokens": \d+', '"num_tokens": -1', text), "is not a count"),
    (lambda text: re.sub(r'"num_tokens": \d+', f'"num_tokens": {10**30}', text), "is not a count"),
    (lambda text: re.sub(r'"num_tokens": \d+', '"num_tokens": 4097', text), "4097 tokens"),
    (lambda text: re.sub(r'"num_sequences": \d+', '"num_sequences": 0', text), "0 sequences"),
    (lambda text: re.sub(r'"num_targets": \d+', '"num_targets": 4000', text), "sums for the chunks"),
    (lambda text: text[:-10], "not a commit record"),
    (lambda text: "[]", "not a commit record"),
    (lambda text: "[" * 5_000, "not a commit record"),
]


@pytest.mark.parametrize(("damage", "message"), RECORD_DAMAGE, ids=[message for _, message in RECORD_DAMAGE])
def test_an_invalid_record_is_refused(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    root = write_cache(tmp_path / "cache", **SMALL)
    store, path = LocalStore(root), root / record_key(0)
    expected = read_root(store).manifest
    text = path.read_text()
    record = read_record(store, expected, 0, ObjectSum.of(text.encode()))
    assert record.to_bytes() == text.encode()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(CacheFormatError, match=message):
        read_record(store, expected, 0, None)
    with pytest.raises(CacheCorruptError, match=r"000000.json is damaged"):
        open_cache(root)


def test_the_checksums_of_the_chunks_equal_the_stored_ones(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=24, codec="fast")
    record = CommitRecord.from_bytes((root / record_key(0)).read_bytes(), "here")
    sums = {key: len(found.chunks) // 4 for key, found in record.objects.items()}
    assert sums["token_ids/c/0"] == 1
    assert sums["topk_ids/c/0/0"] == -(-record.num_targets // 512) == 3
    assert sums["sequences/000000.parquet"] == 0


# The root


def a_root() -> Root:
    described = dataclasses.replace(manifest(cache_settings(), 2, 5), parts=manifest(cache_settings(), 3, 5).parts)
    sums = (ObjectSum.of(b"a"), None, ObjectSum.of(b"c"))
    return Root(manifest=described, commits=sums, pending=described.parts, tokenizer=ObjectSum.of(b"t"))


def test_a_root_comes_back_from_its_bytes_and_from_its_copy_in_the_metadata() -> None:
    root = a_root()
    assert Root.from_bytes(root.to_bytes(), "here") == root
    group = json.loads(derived_metadata(root)["zarr.json"])
    copy = Root.from_values(group["attributes"]["todi_offline"], "there")
    assert copy == dataclasses.replace(root, pending=())  # it follows from what is finished
    assert root.lost_shards == [1]
    assert len(root.parts) == 2


def test_every_changed_byte_of_a_root_is_found() -> None:
    data = a_root().to_bytes()
    for place in range(0, len(data), 3):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises((CacheCorruptError, CacheFormatError)):
            Root.from_bytes(changed, "here")
    for changed in (data[:-1], data + b" ", b"", b"null", b"[" * 10_000):
        with pytest.raises((CacheCorruptError, CacheFormatError)):
            Root.from_bytes(changed, "here")


CONTRADICTIONS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda values: values["commits"].pop(), "names 1 commit records"),
    (lambda values: values.update(commits=[[1], [2]]), "invalid checksums"),
    (lambda values: values.update(commits=[[-1, 0], [2, 0]]), "invalid checksums"),
    (lambda values: values.update(tokenizer=3), "invalid checksums"),
    (lambda values: values.update(pending=3), "has the parts 3, expected a list"),
    (lambda values: values["manifest"]["parts"][0].update(num_shards=2**31 - 1), "its parts have 2147483647 shards"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_a_root_that_contradicts_itself_is_not_believed(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    root = write_cache(tmp_path / "cache", **SMALL)
    edit_root(root, change)
    with pytest.raises(CacheFormatError, match=message):
        open_cache(root)


def test_a_pending_part_of_any_size_costs_nothing(tmp_path: Path) -> None:
    """A small root that claims two thousand million shards is read as quickly as any other."""
    root = write_cache(tmp_path / "cache", **SMALL)
    part = json.loads((root / "cache.json").read_text())["manifest"]["parts"][0]
    edit_root(root, lambda values: values.update(pending=[part | {"num_shards": 2**31 - 1}]))
    assert len(open_cache(root)) == 2
    assert len(open_cache(root, allow_unsealed=True)) == 2


def test_a_cache_whose_root_is_lost_says_that_it_can_be_restored(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", **SMALL)
    (root / "cache.json").unlink()
    with pytest.raises(CacheCorruptError, match="todi-cache repair"):
        open_cache(root)


def test_a_lost_shard_is_named_and_the_others_are_read_when_told_to(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", **SMALL)
    edit_root(root, lambda values: values["commits"].__setitem__(0, None))
    (root / record_key(0)).unlink()
    with pytest.raises(CacheIncompleteError, match="has lost the shards 0"):
        open_cache(root)
    assert open_cache(root, allow_unsealed=True).sequences["id"].to_pylist() == ["fake:1"]


# Format 1


def version_1(**changes: Any) -> dict[str, bytes]:
    """The metadata of a format 1 cache of two parts, of two shards and of one."""
    parts = (*manifest(cache_settings(), 2).parts, *manifest(cache_settings(), 1).parts)
    described = dataclasses.replace(manifest(cache_settings()), parts=parts, format_version=1).to_json() | changes
    group = (json.dumps({"attributes": {"todi_offline": described}})).encode()
    objects = {record_key(shard): ObjectSum.of(bytes([shard])).to_json() for shard in range(3)}
    objects |= {"zarr.json": ObjectSum.of(group).to_json(), "tokenizer.json": ObjectSum.of(b"t").to_json()}
    return {"zarr.json": group, "sealed.json": json.dumps({"num_shards": 3, "objects": objects}).encode()}


def test_a_sealed_cache_of_format_1_has_the_root_that_it_would_have_today() -> None:
    root = read_version_1(version_1().get, "here")
    assert root.commits == tuple(ObjectSum.of(bytes([shard])) for shard in range(3))
    assert (len(root.manifest.parts), root.pending, root.tokenizer) == (2, (), ObjectSum.of(b"t"))
    assert root.manifest.format_version == 2


def test_one_that_is_not_sealed_is_pending() -> None:
    objects = version_1()
    del objects["sealed.json"]
    root = read_version_1(objects.get, "here")
    assert (root.commits, root.manifest.parts, len(root.pending)) == ((), (), 2)


@pytest.mark.parametrize("is_renewed", [False, True], ids=["before", "between the two writes"])
def test_one_that_is_being_appended_to_has_the_parts_that_are_sealed(is_renewed: bool) -> None:
    objects = version_1()
    seal = json.loads(objects["sealed.json"])
    del seal["objects"][record_key(2)]
    first = json.loads(objects["zarr.json"])
    first["attributes"]["todi_offline"]["parts"].pop()
    before = json.dumps(first).encode()
    seal["objects"]["zarr.json"] = ObjectSum.of(before).to_json()
    objects |= {"append.json": objects["zarr.json"], "sealed.json": json.dumps(seal | {"num_shards": 2}).encode()}
    objects["zarr.json"] = objects["zarr.json"] if is_renewed else before
    root = read_version_1(objects.get, "here")
    assert (len(root.commits), len(root.manifest.parts), len(root.pending)) == (2, 1, 1)


@pytest.mark.parametrize("num_shards", [10**15, -1, "3", None, 2])
def test_a_seal_that_contradicts_itself_is_not_believed(num_shards: Any) -> None:
    objects = version_1()
    seal = json.loads(objects["sealed.json"])
    if num_shards == 2:
        del seal["objects"][record_key(1)]
    objects["sealed.json"] = json.dumps(seal | {"num_shards": num_shards}).encode()
    with pytest.raises(CacheFormatError, match=r"sealed.json"):
        read_version_1(objects.get, "here")


def test_metadata_of_format_1_that_were_changed_after_the_seal_are_found() -> None:
    objects = version_1()
    objects["zarr.json"] = objects["zarr.json"].replace(b'"vocab_size": 300', b'"vocab_size": 301')
    with pytest.raises(CacheCorruptError, match=r"zarr.json is damaged"):
        read_version_1(objects.get, "here")


def test_the_manifest_of_a_version_that_is_not_known_is_refused() -> None:
    with pytest.raises(CacheFormatError, match="format version 3"):
        read_version_1(version_1(format_version=3).get, "here")
    with pytest.raises(CacheFormatError, match="no todi_offline manifest"):
        Manifest.from_json({"format_version": None}, "here")
