"""Opening and reading caches: every value back, in any order, from anywhere; and what is refused."""

import json
import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_cache import forge, forge_rows, forge_table, sequence, write_cache

from todi_offline import open_cache
from todi_offline.cache.format.encoding import bounds
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.sequences import SEQUENCE_SCHEMA
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


def test_what_is_no_cache_says_so(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="it has no zarr"):
        open_cache(tmp_path)
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(CacheFormatError, match="holds no todi_offline manifest"):
        open_cache(tmp_path)
    (tmp_path / "zarr.json").write_text("{" * 10_000)
    with pytest.raises(CacheFormatError, match="holds no todi_offline manifest"):
        open_cache(tmp_path)


def edit_manifest(root: Path, **changes: object) -> None:
    group = json.loads((root / "zarr.json").read_text())
    group["attributes"]["todi_offline"] |= changes
    (root / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "is of format version 2, this release reads version 1"),
        ({"settings": {"k": -1}}, "has impossible settings"),
        ({"settings": {"depth": 3}}, "has impossible settings"),
        ({"settings": 5}, "wrong type or range"),
        ({"vocab_size": 10**12}, "wrong type or range"),
        ({"teacher": None}, "wrong type or range"),
        ({"parts": []}, "names no part"),
        ({"parts": [{"recipe": {}}]}, "has a part of a wrong type or range"),
        ({"format_version": "one"}, "holds no todi_offline manifest"),
    ],
)
def test_a_manifest_is_checked_before_it_is_believed(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    root = write_cache(tmp_path / "cache")
    edit_manifest(root, **changes)
    with pytest.raises(CacheFormatError, match=message):
        open_cache(root)


def test_a_manifest_that_lacks_a_part_names_it(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    group = json.loads((root / "zarr.json").read_text())
    del group["attributes"]["todi_offline"]["teacher"]
    (root / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(CacheFormatError, match=r"the manifest of .* lacks teacher"):
        open_cache(root)


def test_metadata_that_was_changed_after_the_seal_is_found(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    edit_manifest(root, vocab_size=299)
    with pytest.raises(CacheCorruptError, match=r"zarr.json is not what was written: \d+ bytes"):
        open_cache(root)


def test_an_unsealed_cache_is_opened_only_when_told_to(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits/000001.json").unlink()
    with pytest.raises(CacheIncompleteError, match=r"is not sealed.*run the same `todi capture` again"):
        open_cache(root)
    assert len(open_cache(root, allow_unsealed=True)) == 12
    (root / "commits/000000.json").unlink()
    with pytest.raises(CacheIncompleteError, match="holds no committed shard yet"):
        open_cache(root, allow_unsealed=True)


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


def test_a_record_without_a_table_and_a_table_of_other_columns_are_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["a"]}), sink)
    forge(root, "sequences/000001.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(CacheFormatError, match=re.escape("sequences/000001.parquet has the columns ['id']")):
        open_cache(root)
    record = json.loads((root / "commits/000001.json").read_text())
    del record["objects"]["sequences/000001.parquet"]
    forge(root, "commits/000001.json", json.dumps(record).encode())
    with pytest.raises(CacheFormatError, match=r"is not the record of shard 1: sequences/000001.parquet"):
        open_cache(root)


def test_a_mask_that_supervises_other_positions_than_the_targets_is_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    forge_rows(root, "target_mask", lambda rows: rows.__setitem__(0, 0))
    with pytest.raises(CacheCorruptError, match=r"sequence 0 of .* has \d+ supervised positions and \d+ targets"):
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
    assert {*cache.columns, "id", "source"} == set(SEQUENCE_SCHEMA.names)
    for name, values in cache.columns.items():
        expected = cache.sequences[name]
        if name == "content_key":
            assert values.tobytes() == b"".join(expected.to_pylist())
        else:
            assert (values == expected.to_numpy()).all()
            assert values.dtype == expected.to_numpy().dtype
    assert cache.sequences.schema == SEQUENCE_SCHEMA
    assert cache.sequences["id"].to_pylist() == [f"fake:{number}" for number in range(21)]


def test_bytes_are_counted_by_array(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    counted = open_cache(root).bytes_by_array
    on_disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".json")
    assert sum(counted.values()) == on_disk
    assert min(counted.values()) > 0
