"""The arrays of a cache: their names, dtypes, shapes and object keys."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.fake_cache import settings, write_cache

import todi_offline
from todi_offline.cache.format.codecs import array_metadata
from todi_offline.cache.format.layout import CHUNK_TARGETS, CHUNK_TOKENS, CODECS, ENCODINGS, array_specs
from todi_offline.cache.format.names import record_key, sequences_key
from todi_offline.cache.reader import open_cache
from todi_offline.errors import ConfigError


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


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gaps_are_of_the_kept_ids_where_rows_lie_by_rising_id(encoding: str) -> None:
    specs = array_specs(settings(encoding=encoding), 300)
    by_id = encoding in ("bf16_logit", "root8")
    assert {name for name, spec in specs.items() if spec.gaps} == ({"topk_ids"} if by_id else set())
    assert specs["topk_ids"].dtype == (np.uint32 if by_id else np.uint16)
    assert ("log_partition" in specs) == (encoding == "bf16_logit")


def test_root8_has_small_integers_throughout() -> None:
    specs = array_specs(settings(encoding="root8"), 300)
    dtypes = {name: specs[name].dtype for name in ("topk_logprobs", "tail_logsumexp", "label_logprob", "tail_logprobs")}
    assert dtypes == {"topk_logprobs": np.uint8, "tail_logsumexp": "i2", "label_logprob": "i2", "tail_logprobs": "i1"}


def test_a_vocabulary_whose_keys_do_not_fit_32_bits_is_refused() -> None:
    array_specs(settings(encoding="root8"), 2**23)
    array_specs(settings(), 2**23 + 1)
    for encoding in ("bf16_logit", "root8"):
        with pytest.raises(ConfigError, match=f"has 8,388,609 ids, but {encoding} takes at most 8,388,608"):
            array_specs(settings(encoding=encoding), 2**23 + 1)


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


def test_every_room_is_a_package_without_which_a_wheel_would_lack_it() -> None:
    rooms = {path.parent for path in Path(todi_offline.__file__).parent.rglob("*.py")}
    assert [room for room in rooms if not (room / "__init__.py").exists()] == []
