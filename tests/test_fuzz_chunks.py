"""Malformed chunks and rows: only errors of this library, and bounded memory."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from support.fuzzing import ARRAYS, EDITS, Files, Fuzzed, edited, few_or_many, fuzz, fuzzed, with_crc

from todi_offline.cache.format.codecs import chunk_codec
from todi_offline.cache.format.names import sequences_key
from todi_offline.cache.format.shard import encode_shard
from todi_offline.cache.shard_file import ShardFile
from todi_offline.errors import CacheCorruptError


@pytest.fixture(scope="module", params=["f16 compact", "q8 fast", "bf16_logit balanced", "root8 compact"])
def any_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Fuzzed":
    """One of every encoding, with pcodec, blosc-lz4 and blosc-zstd."""
    encoding, codec = request.param.split()
    return fuzzed(tmp_path_factory, encoding=encoding, codec=codec)


@few_or_many
def test_a_chunk_that_decodes_to_anything_or_not_at_all(any_cache: Fuzzed, count: int) -> None:
    """Mutations of compressed bytes, with all checksums right again."""

    def check(name: str, edits: list[tuple[str, float, bytes]]) -> None:
        any_cache.survives(with_first_chunk(any_cache, name, lambda body: edited(body, edits)))

    fuzz(check, 2 * count, st.sampled_from(ARRAYS), EDITS)


def test_rows_of_any_numbers(any_cache: Fuzzed) -> None:
    """NaN, infinities, ids beyond any vocabulary, in each array by itself and in all at once."""
    rng, codec = np.random.default_rng(0), any_cache.manifest.settings.codec
    changed = {}
    for spec in any_cache.manifest.arrays.values():
        numbers = rng.bytes(spec.dtype.itemsize * int(np.prod(spec.shape(512))))
        values = np.frombuffer(numbers, spec.dtype).reshape(spec.shape(512))
        changed[spec.object_key(0)] = encode_shard(spec, values, codec)
        any_cache.survives(any_cache.with_right_sums({spec.object_key(0): changed[spec.object_key(0)]}))
    any_cache.survives(any_cache.with_right_sums(changed))


def test_a_mask_that_supervises_the_last_position_is_refused(any_cache: Fuzzed) -> None:
    spec = any_cache.manifest.arrays["target_mask"]
    mask = (
        ShardFile(any_cache.root / spec.object_key(0), spec, any_cache.manifest.settings.codec)
        .read_rows(0, 4096)
        .copy()
    )
    first = pq.read_table(pa.BufferReader(any_cache.files[sequences_key(0)]))["num_tokens"][0].as_py()
    mask[0], mask[first - 1] = 0, 1
    data = encode_shard(spec, mask, any_cache.manifest.settings.codec)
    with pytest.raises(CacheCorruptError, match=r"number 0\): its mask supervises the last position"):
        any_cache.with_files(any_cache.with_right_sums({spec.object_key(0): data}), any_cache.train)


@few_or_many
def test_a_chunk_whose_header_says_anything(any_cache: Fuzzed, count: int) -> None:
    """The first 16 bytes are where blosc says how much it holds, and pcodec what and how much."""

    def check(name: str, at: int, value: int) -> None:
        def changed(body: bytes) -> bytes:
            return body[:at] + value.to_bytes(4, "little") + body[at + 4 :]

        any_cache.survives(with_first_chunk(any_cache, name, changed))

    numbers = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 10**9]) | st.integers(0, 2**32 - 1)
    fuzz(check, count, st.sampled_from(ARRAYS), st.integers(0, 12), numbers)


def with_first_chunk(cache: Fuzzed, name: str, change: Callable[[bytes], bytes]) -> Files:
    """Return the files of a cache whose first chunk of an array is changed, with all checksums right."""
    spec = cache.manifest.arrays[name]
    data = cache.files[spec.object_key(0)]
    index = np.frombuffer(data[-spec.chunks_per_shard * 16 - 4 : -4], "<i8").reshape(-1, 2).copy()
    old = int(index[0, 1])
    chunk = with_crc(change(data[: old - 4]))
    index[0, 1] = len(chunk)
    index[1:, 0] += np.where(index[1:, 0] >= 0, len(chunk) - old, 0)
    rest = data[old : -spec.chunks_per_shard * 16 - 4]
    return cache.with_right_sums({spec.object_key(0): chunk + rest + with_crc(index.tobytes())})


@pytest.mark.parametrize("num_rows", [1, 2**25])
def test_a_chunk_that_holds_more_or_less_than_its_place_is_refused(any_cache: Fuzzed, num_rows: int) -> None:
    """A hundred bytes can stand for hundreds of megabytes."""
    spec = any_cache.manifest.arrays["tail_logsumexp"]
    values = np.zeros(num_rows, spec.dtype)
    body = bytes(chunk_codec(any_cache.manifest.settings.codec, spec.dtype).encode(values))
    changed = with_first_chunk(any_cache, spec.name, lambda _: body)
    del values
    any_cache.survives(changed)
    with pytest.raises(CacheCorruptError, match=r"chunk 0 .*tail_logsumexp/c/0/0 is damaged: "):
        any_cache.with_files(changed, any_cache.train)
