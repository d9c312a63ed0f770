"""Reading a cache: every value, in any order, by any number of processes."""

import builtins
import errno
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_cache import edit_root, forge, forge_rows, forge_table, sequence, write_cache

from todi_offline import open_cache
from todi_offline.cache.format.encoding import bounds
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.sequences import SEQUENCE_SCHEMA
from todi_offline.cache.store import LocalStore
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError


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
        ({"settings": {"k": -1}}, "invalid settings"),
        ({"settings": {"depth": 3}}, "invalid settings"),
        ({"settings": 5}, "wrong type or range"),
        ({"vocab_size": 10**12}, "wrong type or range"),
        ({"vocab_size": 3}, "k = 6 of a vocabulary of 3"),
        ({"teacher": None}, "wrong type or range"),
        ({"parts": 5}, "has the parts 5, expected a list"),
        ({"parts": [{"recipe": {}}]}, "has a part of a wrong type or range"),
        ({"parts": []}, "names 2 commit records, but its parts have 0 shards"),
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
