"""Reading caches: every value, in any order, by any number of processes; several caches read like one."""

import builtins
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_cache import edit_root, forge, forge_rows, forge_table, manifest, sequence, settings, write_cache

from todi_offline import open_cache
from todi_offline.cache.format.encoding import bounds
from todi_offline.cache.format.keys import ContentKeys, content_key
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SEQUENCE_SCHEMA, CachedSequence
from todi_offline.cache.reader import Cache, select, union
from todi_offline.cache.store import LocalStore
from todi_offline.cache.stored import StoredCache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheIncompleteError,
    CacheMismatchError,
)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_sequence_comes_back_in_any_order(tmp_path: Path, codec: str, encoding: str) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", codec=codec, encoding=encoding))
    assert len(cache) == 24
    for number in np.random.default_rng(0).permutation(24).tolist():
        expected, found = sequence(number, cache.manifest.settings), cache[number]
        assert (found.token_ids == expected.token_ids).all()
        assert (found.target_mask == expected.target_mask).all()
        assert found.target_mask.dtype == np.bool_
        rows = expected.targets
        within = bounds(found.targets, encoding)
        assert within.keys() == {"logprobs", "tail_logsumexp", "label_logprob", "tail_logprobs"}
        for name, (lower, upper) in within.items():
            assert ((lower - 1e-6 <= getattr(rows, name)) & (getattr(rows, name) <= upper + 1e-6)).all()
        assert (np.sort(found.targets.ids, axis=1) == np.sort(rows.ids, axis=1)).all()
        if encoding != "root8":  # which orders by what it stores
            assert (found.targets.ids == rows.ids).all()
        assert (found.targets.tail_ids == rows.tail_ids).all()


def test_without_tail_samples_there_are_none(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", tail_samples=0))
    assert cache[0].targets.tail_ids is None
    assert "tail_ids" not in cache.manifest.arrays


def test_indices_count_from_both_ends_and_stop_there(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache"))
    assert (cache[-1].token_ids == cache[23].token_ids).all()
    with pytest.raises(IndexError):
        cache[24]
    assert len(list(cache)) == 24


def test_threads_and_forks_read_the_same(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache"))
    expected = [int(cache[index].targets.ids.sum()) for index in range(24)]

    def read(index: int) -> int:
        return int(cache[index].targets.ids.sum())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(24))) == expected
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: theirs.send([read(i) for i in range(24)]))
    child.start()
    assert ours.recv() == expected
    child.join()


@pytest.mark.parametrize("group", [None, "{}", "{" * 10_000, '{"attributes": {"todi_offline": 3}}'])
def test_a_folder_without_a_cache_is_refused(tmp_path: Path, group: str | None) -> None:
    if group is not None:
        (tmp_path / "zarr.json").write_text(group)
    with pytest.raises(CacheFormatError, match=r"is not a cache|no todi_offline manifest"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "has format version 3; this release reads version 2"),
        ({"format_version": "one"}, "has format version 'one'"),
        ({"settings": {"k": -1}}, "impossible settings"),
        ({"settings": {"depth": 3}}, "impossible settings"),
        ({"settings": 5}, "wrong type or range"),
        ({"vocab_size": 10**12}, "wrong type or range"),
        ({"vocab_size": 3}, "k = 6 of a vocabulary of 3"),
        ({"teacher": None}, "wrong type or range"),
        ({"parts": 5}, "in the place of its parts"),
        ({"parts": [{"recipe": {}}]}, "has a part of a wrong type or range"),
        ({"parts": []}, "names 2 commit records, and its parts have 0 shards"),
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=2, per_shard=1, codec="fast")
    edit_root(root, lambda values: values["manifest"].update(changes))
    with pytest.raises(CacheFormatError, match=message):
        open_cache(root)


def test_a_manifest_that_lacks_a_field_names_it(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=1, codec="fast")
    edit_root(root, lambda values: values["manifest"].pop("teacher"))
    with pytest.raises(CacheFormatError, match="lacks teacher"):
        open_cache(root)


def test_an_unfinished_cache_is_opened_only_when_told_to(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits/000001.json").unlink()
    with pytest.raises(CacheIncompleteError, match=r"is not finished: run the same `todi capture` again"):
        open_cache(root)
    assert len(open_cache(root, allow_unsealed=True)) == 12
    (root / "commits/000000.json").unlink()
    with pytest.raises(CacheIncompleteError, match="holds no committed shard yet"):
        open_cache(root, allow_unsealed=True)


@pytest.mark.parametrize("name", ["0.json", "0000000.json", "000000.json.bak", "notes.md"])
def test_a_copy_of_a_record_under_another_name_is_not_read_as_a_shard(tmp_path: Path, name: str) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits" / name).write_bytes((root / "commits/000000.json").read_bytes())
    assert len(open_cache(root, allow_unsealed=True)) == 24


def test_a_missing_shard_is_named_and_a_damaged_chunk_names_the_sequence(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    cache = open_cache(root)
    shard = root / "topk_logprobs/c/1/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 4
    shard.write_bytes(data)
    cache[0]
    with pytest.raises(CacheCorruptError, match=r"sequence 'fake:12' \(number 12\): chunk 0 .*topk_logprobs/c/1/0"):
        cache[12]
    shard.unlink()
    with pytest.raises(CacheIncompleteError, match=r"sequence 'fake:12' .*topk_logprobs/c/1/0"):
        cache[12]
    (root / "sequences/000000.parquet").unlink()
    with pytest.raises(CacheIncompleteError, match=r"lacks sequences/000000.parquet"):
        open_cache(root)


@pytest.mark.parametrize(
    ("column", "value"),
    [("token_start", -1), ("token_start", 2**62), ("num_tokens", 2**31 - 1), ("num_targets", -5)],
)
def test_a_sequence_outside_its_shard_is_refused_before_it_is_read(tmp_path: Path, column: str, value: int) -> None:
    root = write_cache(tmp_path / "cache")
    forge_table(root, column, lambda values: values.__setitem__(3, value))
    with pytest.raises(CacheFormatError, match=r"sequence 'fake:3' of .* lies outside its shard on the (token|target)"):
        open_cache(root)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = (root / "sequences/000000.parquet").read_bytes()
    forge_table(root, "num_tokens", lambda values: values.__setitem__(0, None))
    with pytest.raises(CacheFormatError, match="has empty cells"):
        open_cache(root)
    for data in (b"PAR1", whole[:-300] + b"\xff" * 292 + whole[-8:]):
        forge(root, "sequences/000000.parquet", data)
        with pytest.raises(CacheCorruptError, match=r"000000.parquet cannot be read: .+"):
            open_cache(root)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"id": ["a"]}), "has the columns"),
        (pa.table({"id": ["a", "b"]}), "has 2 rows, expected 1"),
    ],
    ids=["columns", "rows"],
)
def test_a_table_of_other_columns_or_rows_is_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    root = write_cache(tmp_path / "cache", per_shard=1)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    forge(root, "sequences/000001.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(CacheFormatError, match=message):
        open_cache(root)


def test_a_record_that_names_no_table_is_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", per_shard=1)
    record = json.loads((root / "commits/000001.json").read_text())
    del record["objects"]["sequences/000001.parquet"]
    forge(root, "commits/000001.json", json.dumps(record).encode())
    with pytest.raises(CacheFormatError, match=r"not the commit record of shard 1: .*sequences/000001.parquet"):
        open_cache(root)


def test_a_mask_that_supervises_other_positions_than_the_targets_is_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    forge_rows(root, "target_mask", lambda rows: rows.__setitem__(0, 0))
    with pytest.raises(CacheCorruptError, match=r"sequence 'fake:0' .* supervises \d+ positions .* has \d+ targets"):
        open_cache(root)[0]


def test_a_folder_in_the_place_of_an_object_is_one_line(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    cache = open_cache(root)
    (root / "topk_ids/c/0/0").unlink()
    (root / "topk_ids/c/0/0").mkdir()
    with pytest.raises(CacheError, match=r"sequence 'fake:0' .*topk_ids/c/0/0"):
        cache[0]


def test_columns_are_the_sequence_tables_without_their_text(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", num_shards=7, per_shard=3, codec="fast"))
    assert {*cache.columns, "content_key", "id", "source"} == set(SEQUENCE_SCHEMA.names)
    for name, values in cache.columns.items():
        expected = cache.sequences[name].to_numpy()
        np.testing.assert_array_equal(values, expected)
        assert name == "shard" or values.dtype == expected.dtype  # shards are numbered through the members
    assert list(cache.content_keys) == cache.sequences["content_key"].to_pylist()
    assert cache.sequences.schema == SEQUENCE_SCHEMA
    assert cache.sequences["id"].to_pylist() == [f"fake:{number}" for number in range(21)]


def test_bytes_are_counted_by_array(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    counted = open_cache(root).bytes_by_array
    on_disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".json")
    assert sum(counted.values()) == on_disk
    assert min(counted.values()) > 0


# What opening asks of the store


class Counting(LocalStore):
    """Counts how often each object is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, key: str, limit: int | None = None) -> bytes:
        self.reads[key] += 1
        return super().read(key, limit)


@pytest.mark.parametrize("allow_unsealed", [False, True])
def test_opening_reads_no_object_twice(tmp_path: Path, allow_unsealed: bool) -> None:
    store = Counting(write_cache(tmp_path / "cache", num_shards=3, per_shard=1))
    open_cache(store, allow_unsealed=allow_unsealed)
    shards = [key for shard in range(3) for key in (f"commits/{shard:06d}.json", f"sequences/{shard:06d}.parquet")]
    assert store.reads == dict.fromkeys(["cache.json", *shards], 1)


FAILURES = [errno.EIO, errno.EACCES]


@pytest.mark.parametrize("code", FAILURES, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("allow_unsealed", [False, True])
def test_a_disk_error_on_opening_is_a_read_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, allow_unsealed: bool
) -> None:
    """Every file and folder that opening touches fails in turn, and none of them passes for one that is not there."""
    root = write_cache(tmp_path / "cache", num_shards=2, per_shard=1)
    touched = touched_by(monkeypatch, root, lambda: open_cache(root, allow_unsealed=allow_unsealed))
    assert {Path(path).name for path in touched} >= {"cache.json", "000000.json", "000001.parquet"}
    for path in touched:
        with monkeypatch.context() as patch:
            refuse(patch, path, code)
            with pytest.raises(CacheError) as caught:
                open_cache(root, allow_unsealed=allow_unsealed)
        assert os.strerror(code) in str(caught.value), path
        assert not isinstance(caught.value, CacheIncompleteError | CacheFormatError | CacheCorruptError), path


@pytest.mark.parametrize("code", FAILURES, ids=errno.errorcode.__getitem__)
def test_a_disk_error_on_reading_names_the_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=1)
    cache = open_cache(root)
    touched = touched_by(monkeypatch, root, lambda: cache[0])
    assert len([path for path in touched if "/c/0" in path]) == 8
    for path in touched:
        with monkeypatch.context() as patch:
            refuse(patch, path, code)
            with pytest.raises(CacheError, match="'fake:0'") as caught:
                cache[0]
        assert os.strerror(code) in str(caught.value), path
        assert not isinstance(caught.value, CacheIncompleteError | CacheCorruptError), path


NAMES = ("stat", "open", "scandir", "listdir")


def touched_by(monkeypatch: pytest.MonkeyPatch, root: Path, work: Callable[[], object]) -> list[str]:
    """Return all paths below a folder that something looks at."""
    found: dict[str, None] = {}

    def note(path: Any) -> None:
        if not isinstance(path, int) and str(os.fsdecode(path)).startswith(str(root)):
            found[os.fsdecode(path)] = None

    with monkeypatch.context() as patch:
        watch(patch, note)
        work()
    return list(found)


def refuse(patch: pytest.MonkeyPatch, broken: str, code: int) -> None:
    def before(path: Any) -> None:
        if not isinstance(path, int) and os.fsdecode(path) == broken:
            raise OSError(code, os.strerror(code), broken)

    watch(patch, before)


def watch(patch: pytest.MonkeyPatch, before: Callable[[Any], None]) -> None:
    """Call `before` with the path of everything that is opened or looked at."""

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **options: Any) -> Any:
            before(path)
            return real(path, *args, **options)

        return call

    opened = watched(io.open)
    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)
    for name in NAMES:
        patch.setattr(os, name, watched(getattr(os, name)))


# Several caches, or some sequences of one


def cache_of(root: Path, numbers: Iterable[int], identity: dict[str, Any] | None = None, **changes: Any) -> Cache:
    """Write and open a cache of these made-up sequences, four a shard."""
    chosen, numbers = settings(codec="fast", **changes), list(numbers)
    num_shards = -(-len(numbers) // 4)
    described = dataclasses.replace(manifest(chosen, num_shards, len(numbers)), **(identity or {}))
    with CacheWriter(root, described) as writer:
        for shard in range(num_shards):
            writer.write_shard(shard, [sequence(number, chosen) for number in numbers[4 * shard :][:4]])
        writer.seal()
    return open_cache(root)


def ids_of(cache: Any) -> list[int]:
    return [int(name.removeprefix("fake:")) for name in cache.sequences["id"].to_pylist()]


def assert_same(found: CachedSequence, expected: CachedSequence) -> None:
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.target_mask, expected.target_mask)
    assert found.targets.temperatures == expected.targets.temperatures
    arrays = found.targets.arrays()
    assert arrays.keys() == expected.targets.arrays().keys()
    for name, values in expected.targets.arrays().items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_a_union_holds_each_content_once_the_first_cache_first(tmp_path: Path) -> None:
    first, second = cache_of(tmp_path / "a", [5, 1, 4, 2, 3]), cache_of(tmp_path / "b", [3, 9, 1, 8, 9, 7])
    view = union([first, second])
    assert ids_of(view) == [5, 1, 4, 2, 3, 9, 8, 7]
    assert len(view) == 8
    places = [*enumerate(range(5), 0), (5, 1), (6, 3), (7, 5)]
    for index, place in places:
        assert_same(view[index], (first if index < 5 else second)[place])
    assert_same(view[-1], second[5])
    for found, index in zip(view, range(8), strict=True):
        assert_same(found, view[index])
    with pytest.raises(IndexError):
        view[8]


def test_a_view_has_the_numbers_of_its_sequences(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(6)), cache_of(tmp_path / "b", range(4, 12))]
    view = union(caches)
    assert view.num_tokens.tolist() == [len(found.token_ids) for found in view]
    assert view.num_targets.tolist() == [len(found.targets) for found in view]
    keys = ContentKeys.of(content_key(found.token_ids, found.target_mask) for found in view)
    assert view.content_keys == keys
    expected = [-found.targets.label_logprob.mean() for found in view]
    np.testing.assert_allclose(view.columns["teacher_nll"], expected, rtol=1e-5)
    assert view.shards.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert view.root == f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert len(view.manifest.parts) == 2
    assert view.bytes_by_array["topk_ids"] == sum(cache.bytes_by_array["topk_ids"] for cache in caches)
    assert view.store is caches[0].members[0].store


def test_a_shard_of_a_view_is_prepared_in_its_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = union([cache_of(tmp_path / "a", range(6)), cache_of(tmp_path / "b", range(6, 12))])
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(StoredCache, "prepare", lambda stored, shard: asked.append((stored.store.root.name, shard)))
    for shard in np.unique(view.shards).tolist():
        view.prepare(shard)
    assert asked == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_rows_are_narrowed_to_the_settings_that_all_members_share(tmp_path: Path) -> None:
    wide = cache_of(tmp_path / "wide", range(4), k=9, temperatures=(1.0, 2.0, 4.0), tail_samples=5)
    other = cache_of(tmp_path / "other", range(2, 7), k=6, temperatures=(4.0, 1.0), tail_samples=3)
    view = union([wide, other])
    chosen = view.manifest.settings
    assert (chosen.k, chosen.temperatures, chosen.tail_samples) == (6, (1.0, 4.0), 3)
    for index in range(7):
        member = wide[index] if index < 4 else other[index - 2]
        key = content_key(member.token_ids, member.target_mask)
        expected = dataclasses.replace(member, targets=narrow(member.targets, chosen, key))
        assert_same(view[index], expected)
    asked = dataclasses.replace(chosen, k=2, tail_samples=0)
    assert union([wide, other], asked)[0].targets.ids.shape[1] == 2
    assert union([wide, other], asked)[0].targets.tail_ids is None


def test_where_one_has_no_samples_none_has(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6), tail_samples=0)]
    assert all(found.targets.tail_ids is None for found in union(caches))


def test_caches_of_different_encodings_give_rows_of_the_same_arrays(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / name, [number, number + 1], encoding=name) for number, name in enumerate(ENCODINGS)]
    view = union(caches)
    assert len(view) == len(ENCODINGS) + 1
    whole = TargetRows.concatenate([found.targets for found in view])
    assert len(whole) == view.num_targets.sum()
    assert whole.log_partition is None
    alone = union([cache for cache in caches if cache.manifest.settings.encoding == "bf16_logit"])
    assert alone[0].targets.log_partition is not None


def test_a_selection_has_exactly_these_in_this_order_and_may_repeat(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(5)), cache_of(tmp_path / "b", range(5, 9))]
    view = union(caches)
    keys = ContentKeys.of(sequence(number, settings()).content_key for number in (7, 2, 7, 0))
    chosen = select(view, view.content_keys.find(keys))
    assert ids_of(chosen) == [7, 2, 7, 0]
    assert_same(chosen[0], caches[1][2])
    assert ids_of(select(chosen, np.array([3, 0]))) == [0, 7]
    alone = select(caches[1], np.array([2, 0]))
    assert ids_of(alone) == [7, 5]
    assert_same(alone[1], caches[1][0])
    assert alone.manifest == caches[1].manifest


def test_a_view_travels_to_another_process(tmp_path: Path) -> None:
    view = union([cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6), k=4)])
    arrived = pickle.loads(pickle.dumps(view))
    for found, expected in zip(arrived, view, strict=True):
        assert_same(found, expected)


def test_an_unreadable_sequence_is_an_error_that_names_the_member(tmp_path: Path) -> None:
    view = union([cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6))])
    file = tmp_path / "b" / "topk_ids" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    view[0]
    with pytest.raises(CacheCorruptError, match=r"/b: sequence 'fake:4' \(number 1\): chunk 0 .*topk_ids"):
        view[4]
    forge_rows(tmp_path / "a", "target_mask", lambda rows: rows.__setitem__(0, 0))
    with pytest.raises(CacheCorruptError, match=r"/a: .*supervises"):
        union([open_cache(tmp_path / "a")])[0]


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"teacher": {"model_type": "other"}}, r"teacher\.model_type: 'other' in .*/b, 'fake' in .*/a.*mix teachers"),
    ({"tokenizer": {"vocabulary": "z", "merges": "b"}}, r"tokenizer\.vocabulary: 'z' in .*/b, 'a' in .*/a"),
    ({"vocab_size": 301}, r"vocab_size: 301 in .*/b, 300 in .*/a"),
]


@pytest.mark.parametrize(("identity", "message"), OTHERS)
def test_caches_of_different_teachers_tokenizers_or_vocabularies_are_refused_with_both_values(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    caches = [cache_of(tmp_path / "a", [1]), cache_of(tmp_path / "b", [2], identity)]
    with pytest.raises(CacheMismatchError, match=message):
        union(caches)
    if "teacher" in identity:
        view = union(caches, mix_teachers=True)
        assert ids_of(view) == [1, 2]
        assert view.manifest.teacher == {"mixed": [cache.manifest.teacher for cache in caches]}
    else:
        with pytest.raises(CacheMismatchError, match=message):
            union(caches, mix_teachers=True)


def test_rows_that_have_no_temperature_in_common_are_refused(tmp_path: Path) -> None:
    caches = [
        cache_of(tmp_path / "a", [1], temperatures=(1.0, 2.0), tail_samples=0),
        cache_of(tmp_path / "b", [2], temperatures=(3.0,), tail_samples=0),
    ]
    with pytest.raises(CacheMismatchError, match=r"temperatures are \(1\.0, 2\.0\) in .*/a, \(3\.0,\) in .*/b"):
        union(caches)


def test_samples_that_were_drawn_at_different_temperatures_are_refused(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", [1]), cache_of(tmp_path / "b", [2], tail_temperature=2.0)]
    with pytest.raises(CacheMismatchError, match=r"tail_temperature are 1\.0 in .*/a, 2\.0 in .*/b"):
        union(caches)


def test_a_slice_is_a_cache_of_these_sequences(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "a", range(7))
    assert isinstance(cache[0:2], Cache)
    assert ids_of(cache[0:2]) == [0, 1]
    assert ids_of(cache[::-2]) == [6, 4, 2, 0]
    assert ids_of(cache[1:][-1:]) == [6]
    assert (len(cache[5:3]), list(cache[9:])) == (0, [])
    assert_same(cache[2:5][1], cache[3])
    assert cache[2:5].num_tokens.tolist() == cache.num_tokens[2:5].tolist()


def test_an_open_cache_does_not_change_when_sequences_are_appended(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "a", range(4))
    added = dataclasses.replace(manifest(settings(codec="fast")).parts[0], content="d", num_shards=1, num_sequences=1)
    longer = dataclasses.replace(cache.manifest, parts=(*cache.manifest.parts, added))
    with CacheWriter(tmp_path / "a", longer) as writer:
        writer.write_shard(1, [sequence(9, cache.manifest.settings)])
        writer.seal()
    assert (len(cache), len(open_cache(tmp_path / "a"))) == (4, 5)
    assert [found.token_ids.tolist() for found in cache] == [found.token_ids.tolist() for found in cache[:]]
