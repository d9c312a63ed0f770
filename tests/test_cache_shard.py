"""Shards against zarr-python, in both directions, and what a damaged one says."""

import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from fake_cache import settings, write_cache

from todi_offline.cache.layout import CODECS, ENCODINGS, ArraySpec, array_specs
from todi_offline.cache.reader import open_cache
from todi_offline.cache.shard import ShardFile, encode_shard
from todi_offline.errors import CacheCorruptError, CacheIncompleteError


def zarr_group(root: Path) -> Any:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
        names = array_specs(settings(), 300)
        return {name: group[name][...] for name in names}, group


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zarr_reads_what_is_written_here(tmp_path: Path, codec: str, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", codec=codec, encoding=encoding)
    arrays, _ = zarr_group(root)
    cache = open_cache(root)
    assert arrays.keys() == cache.manifest.arrays.keys()
    for name, spec in cache.manifest.arrays.items():
        assert arrays[name].dtype == spec.dtype
        for shard in range(2):
            ours = ShardFile(root / spec.object_key(shard), spec, codec).read_rows(0, spec.shard_rows)
            assert (ours == arrays[name][shard * 4096 : (shard + 1) * 4096]).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_zarr_writes_is_read_here(tmp_path: Path, codec: str, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, codec=codec, encoding=encoding)
    _, group = zarr_group(root)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        for name, spec in array_specs(settings(codec=codec, encoding=encoding), 300).items():
            values = rng.integers(1, 200, spec.shape(4096)).astype(spec.dtype)
            group[name][...] = values
            file = ShardFile(root / spec.object_key(0), spec, codec)
            assert (file.read_rows(0, 4096) == values).all()
            assert (file.read_rows(700, 1300) == values[700:1300]).all()


def one_shard(tmp_path: Path) -> tuple[ShardFile, ArraySpec]:
    spec = array_specs(settings(), 300)["topk_ids"]
    values = np.random.default_rng(0).integers(0, 300, (1000, 6))
    path = tmp_path / "0"
    path.write_bytes(encode_shard(spec, values, "compact"))
    return ShardFile(path, spec, "compact"), spec


def test_rows_beyond_the_given_ones_are_zero(tmp_path: Path) -> None:
    file, _ = one_shard(tmp_path)
    assert file.read_rows(1000, 4096).shape == (3096, 6)
    assert not file.read_rows(1000, 4096).any()
    assert file.read_rows(5, 5).shape == (0, 6)


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
    with pytest.raises(CacheCorruptError, match=r"the chunk index of .* is damaged"):
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
        with pytest.raises(CacheCorruptError, match=r"the chunk index of .* points outside the file"):
            file.read_rows(0, 1)
