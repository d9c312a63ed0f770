"""Shards read and written by zarr-python, and the errors of damaged shards."""

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.fake_cache import settings, write_cache

from todi_offline.cache.format.layout import CHUNK_TARGETS, CODECS, ENCODINGS, MAX_GAPS_VOCAB, ArraySpec, array_specs
from todi_offline.cache.format.shard import encode_shard, index_bytes
from todi_offline.cache.reader import open_cache
from todi_offline.cache.shard_file import ShardFile
from todi_offline.errors import CacheCorruptError, CacheIncompleteError


def zarr_group(root: Path, encoding: str) -> Any:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
        return {name: group[name][...] for name in array_specs(settings(encoding=encoding), 300)}, group


def rows_of_gaps(gaps: Any) -> list[list[int]]:
    """Return the ids of each row of an array with gaps, as a reader that only knows the description would."""
    rows: list[list[int]] = []
    for chunk in np.split(gaps, len(gaps) // CHUNK_TARGETS):
        if not chunk.any():  # an absent one
            rows += chunk.tolist()
            continue
        key, members = 0, [list[int]() for _ in range(CHUNK_TARGETS)]
        for gap in chunk.ravel().tolist():
            key += gap
            members[key % CHUNK_TARGETS].append(key // CHUNK_TARGETS)
        rows += members
    return rows


def gaps_of_rows(rows: Any) -> Any:
    """Return what is stored of rows of ids: the opposite of `rows_of_gaps`."""
    chunks = []
    for chunk in np.split(rows, len(rows) // CHUNK_TARGETS):
        keys = sorted(member * CHUNK_TARGETS + row for row, ids in enumerate(chunk.tolist()) for member in ids)
        chunks.append(
            np.array([after - key for key, after in zip([0, *keys], keys, strict=False)]).reshape(chunk.shape)
        )
    return np.concatenate(chunks)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zarr_can_read_our_shards(tmp_path: Path, codec: str, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", codec=codec, encoding=encoding)
    arrays, _ = zarr_group(root, encoding)
    cache = open_cache(root)
    assert arrays.keys() == cache.manifest.arrays.keys()
    for name, spec in cache.manifest.arrays.items():
        assert arrays[name].dtype == spec.dtype
        theirs = np.array(rows_of_gaps(arrays[name])) if spec.gaps else arrays[name]
        for shard in range(2):
            ours = ShardFile(root / spec.object_key(shard), spec, codec).read_rows(0, spec.shard_rows)
            assert (ours == theirs[shard * 4096 : (shard + 1) * 4096]).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shards_written_by_zarr_can_be_read(tmp_path: Path, codec: str, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, codec=codec, encoding=encoding)
    _, group = zarr_group(root, encoding)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        for name, spec in array_specs(settings(codec=codec, encoding=encoding), 300).items():
            values = np.sort(rng.integers(1, 100, spec.shape(4096)).astype(spec.dtype))
            group[name][...] = gaps_of_rows(values) if spec.gaps else values
            file = ShardFile(root / spec.object_key(0), spec, codec)
            assert (file.read_rows(0, 4096) == values).all()
            assert (file.read_rows(700, 1300) == values[700:1300]).all()


def one_shard(tmp_path: Path) -> tuple[ShardFile, ArraySpec]:
    spec = array_specs(settings(), 300)["topk_ids"]
    values = np.random.default_rng(0).integers(0, 300, (1000, 6))
    path = tmp_path / "0"
    path.write_bytes(encode_shard(spec, values, "compact"))
    return ShardFile(path, spec, "compact"), spec


@given(st.data())
@examples(max_examples=50, deadline=None)
def test_ids_come_back_from_gaps_row_by_row_rising(data: st.DataObject) -> None:
    columns, most = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 40, MAX_GAPS_VOCAB]))
    spec = array_specs(settings(k=columns, encoding="root8"), most)["topk_ids"]
    ids = np.random.default_rng(data.draw(st.integers(0, 99))).integers(
        0, most, (data.draw(st.integers(1, 900)), columns)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0"
        path.write_bytes(encode_shard(spec, ids, "compact"))
        back = ShardFile(path, spec, "compact").read_rows(0, 1000)
    assert (back[: len(ids)] == np.sort(ids, axis=1)).all()
    assert not back[len(ids) :].any()


def test_gaps_whose_rows_differ_in_length_are_damaged(tmp_path: Path) -> None:
    spec = array_specs(settings(encoding="root8"), 300)["topk_ids"]
    plain = dataclasses.replace(spec, gaps=False)
    gaps = gaps_of_rows(np.sort(np.random.default_rng(0).integers(0, 300, (512, 6)), axis=1))
    for number, place in enumerate([(200, 3), (511, 5)]):
        forged = gaps.copy()
        forged[place] += 1
        file = ShardFile(tmp_path / str(number), spec, "compact")
        file.path.write_bytes(encode_shard(plain, forged, "compact"))
        with pytest.raises(CacheCorruptError, match="its rows differ in length"):
            file.read_rows(0, 1)


def test_rows_beyond_the_given_ones_are_zero(tmp_path: Path) -> None:
    file, _ = one_shard(tmp_path)
    assert file.read_rows(1000, 4096).shape == (3096, 6)
    assert not file.read_rows(1000, 4096).any()
    assert file.read_rows(5, 5).shape == (0, 6)


def with_tensorstore(root: Path, name: str) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "file", "path": str(root / name)}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result()


@pytest.mark.parametrize("codec", CODECS)
def test_other_readers_find_zeros_where_no_row_uses_a_chunk(tmp_path: Path, codec: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=2, per_shard=12, codec=codec, shard_tokens=8192)
    cache = open_cache(root)
    ours, _ = zarr_group(root, "f16")
    for name, spec in cache.manifest.arrays.items():
        used = [int((cache.num_tokens if spec.axis == "token" else cache.num_targets)[:12].sum())]
        stored = spec.chunks_of(used[0])
        assert stored < spec.chunks_per_shard
        readers = [ours[name], *([] if codec == "compact" else [with_tensorstore(root, name)])]
        for values in readers:
            np.testing.assert_array_equal(values, ours[name])
            assert values[: used[0]].any()
            assert not values[stored * spec.chunk_rows : 8192].any()


def test_an_unused_chunk_takes_no_bytes(tmp_path: Path) -> None:
    sizes = []
    for shard_tokens in (4096, 262_144):
        spec = array_specs(settings(shard_tokens=shard_tokens), 300)["topk_ids"]
        data = encode_shard(spec, np.ones((60, 6), np.uint16), "compact")
        sizes.append(len(data) - index_bytes(spec))
    assert sizes[0] == sizes[1]


def test_a_used_chunk_that_is_lost_does_not_pass_for_an_unused_one(tmp_path: Path) -> None:
    """Someone leaves the last used chunk out of a shard's index, whose own checksum is right."""
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=24, codec="fast")
    spec = array_specs(settings(), 300)["topk_ids"]
    path = root / spec.object_key(0)
    cut = ShardFile(path, spec, "fast").read_rows(0, 512)
    path.write_bytes(encode_shard(spec, cut, "fast"))
    with pytest.raises(CacheCorruptError, match="holds 1 chunks, and its commit record describes"):
        list(open_cache(root))


@pytest.mark.parametrize(("codec", "warned_of"), [("fast", []), ("balanced", []), ("compact", ["Numcodecs codecs"])])
def test_zarr_lists_the_arrays_and_warns_of_no_file(tmp_path: Path, codec: str, warned_of: list[str]) -> None:
    """It looks at the metadata in the group alone, not at the folder, where it would meet what is no array.

    Of pcodec, which no specification of Zarr has yet, it warns whoever wrote the array.
    """
    import zarr

    root = write_cache(tmp_path / "cache", codec=codec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group: Any = zarr.open_group(str(root), mode="r")
        names = {name for name, _ in group.arrays()}
        assert [name for name, _ in group.groups()] == []
        list(group.members())
    assert names == open_cache(root).manifest.arrays.keys()
    assert {str(warning.message)[:16] for warning in caught} == set(warned_of)


def test_more_rows_than_a_shard_holds_are_never_cut_off_in_silence() -> None:
    spec = array_specs(settings(), 300)["label_logprob"]
    with pytest.raises(AssertionError, match="no shard overflow"):
        encode_shard(spec, np.zeros(4097), "fast")


def test_every_flipped_bit_of_a_chunk_is_found_when_it_is_read(tmp_path: Path) -> None:
    file, _ = one_shard(tmp_path)
    whole = bytearray(file.path.read_bytes())
    for position in range(0, 200, 7):
        damaged = whole.copy()
        damaged[position] ^= 1 << position % 8
        file.path.write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=r"chunk 0 \(rows 0 to 512\) of .* is damaged"):
            file.read_rows(0, 10)


def test_a_damaged_index_a_cut_file_and_a_missing_file_say_so(tmp_path: Path) -> None:
    file, _ = one_shard(tmp_path)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(CacheCorruptError, match="checksum of its chunk index"):
        file.read_rows(0, 1)
    file.path.write_bytes(whole[:50])
    with pytest.raises(CacheCorruptError, match="is cut short: 50 bytes"):
        file.read_rows(0, 1)
    file.path.unlink()
    with pytest.raises(CacheIncompleteError, match="the cache lacks"):
        file.read_rows(0, 1)


def shard_of(chunks: list[bytes], index: np.ndarray) -> bytes:
    """Put a shard together whose checksums are right, whatever its chunks and its index say."""
    data = index.astype("<u8").tobytes()
    return b"".join([chunk + crc(chunk) for chunk in chunks] + [data, crc(data)])


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_with_right_checksums_and_other_contents_are_damaged(tmp_path: Path, codec: str) -> None:
    spec = array_specs(settings(), 300)["topk_ids"]
    short = ArraySpec("topk_ids", "target", spec.dtype, 6, 512)
    for number, body in enumerate((b"", b"garbage", encode_shard(short, np.zeros((512, 6)), codec)[:-30])):
        file = ShardFile(tmp_path / str(number), spec, codec)
        index = np.array([[0, len(body) + 4]] * 8)
        file.path.write_bytes(shard_of([body], index))
        with pytest.raises(CacheCorruptError, match=r"chunk 0 \(rows 0 to 512\) of .* is damaged: "):
            file.read_rows(0, 1)


def test_an_index_that_points_outside_the_file_is_refused(tmp_path: Path) -> None:
    spec = array_specs(settings(), 300)["topk_ids"]
    for number, pair in enumerate([(0, 2**63), (2**64 - 4, 8), (60, 8), (0, 3)]):
        file = ShardFile(tmp_path / str(number), spec, "fast")
        file.path.write_bytes(shard_of([bytes(58)], np.array([pair] * 8, "<u8")))
        with pytest.raises(CacheCorruptError, match="chunk index points outside"):
            file.read_rows(0, 1)
