"""Which arrays a cache has, of which dtype and shape, and where their objects lie."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import zarr
from fake_cache import settings, write_cache

from todi_offline.cache.layout import (
    CHUNK_TARGETS,
    CHUNK_TOKENS,
    CODECS,
    ENCODINGS,
    array_specs,
    record_key,
    sequences_key,
)
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import array_metadata


def test_ids_take_two_bytes_up_to_65536_and_four_beyond() -> None:
    for vocab_size, dtype in ((512, np.uint16), (65_536, np.uint16), (65_537, np.uint32)):
        specs = array_specs(settings(), vocab_size)
        assert specs["topk_ids"].dtype == specs["tail_ids"].dtype == dtype
        assert specs["token_ids"].dtype == np.uint32


def test_tail_arrays_are_there_where_samples_are() -> None:
    assert {"tail_ids", "tail_logprobs"} <= array_specs(settings(), 300).keys()
    assert not {"tail_ids", "tail_logprobs"} & array_specs(settings(tail_samples=0), 300).keys()


def test_an_array_has_a_column_for_each_entry_temperature_and_sample() -> None:
    specs = array_specs(settings(k=5, tail_samples=2, temperatures=(1.0, 2.0, 4.0), encoding="q8"), 300)
    columns = {name: spec.columns for name, spec in specs.items()}
    assert columns == {
        "token_ids": None,
        "target_mask": None,
        "topk_ids": 5,
        "topk_logprobs": 5,
        "tail_logsumexp": 3,
        "label_logprob": None,
        "tail_ids": 2,
        "tail_logprobs": 2,
    }
    assert specs["topk_logprobs"].dtype == np.uint8
    assert specs["tail_logprobs"].dtype == np.float16


def test_chunks_divide_shards_and_keys_are_zarrs_own() -> None:
    specs = array_specs(settings(shard_tokens=8192), 300)
    assert (specs["token_ids"].chunk_rows, specs["topk_ids"].chunk_rows) == (CHUNK_TOKENS, CHUNK_TARGETS)
    assert (specs["token_ids"].chunks_per_shard, specs["topk_ids"].chunks_per_shard) == (2, 16)
    assert specs["token_ids"].object_key(3) == "token_ids/c/3"
    assert specs["topk_ids"].object_key(3) == "topk_ids/c/3/0"
    assert (sequences_key(3), record_key(3)) == ("sequences/000003.parquet", "commits/000003.json")


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize(("codec", "encoding"), list(itertools.product(CODECS, ENCODINGS)))
def test_zarr_reads_the_same_shape_dtype_and_chunks_from_the_metadata(
    tmp_path: Path, codec: str, encoding: str
) -> None:
    root = write_cache(tmp_path / "cache", codec=codec, encoding=encoding)
    for name, spec in open_cache(root).manifest.arrays.items():
        assert (root / name / "zarr.json").read_bytes() == array_metadata(spec, codec, 2)
        array = zarr.open_array(root / name, mode="r")
        assert array.shape == spec.shape(2 * spec.shard_rows)
        assert array.shards == spec.shape(spec.shard_rows)
        assert array.chunks == spec.shape(spec.chunk_rows)
        assert array.dtype == spec.dtype
