"""Rows in, the bytes of a Zarr shard out; and back, one chunk at a time, without Zarr.

A shard is a plain `sharding_indexed` one: the inner chunks, each followed by its CRC-32C, then an index with an
(offset, bytes) pair of u64 for each chunk, then the CRC-32C of the index. The used chunks come first. Chunks that no
row uses are absent: Zarr marks them by 2^64 - 1 in their pair and reads them as zeros. In the tests zarr-python is the
oracle of both directions.

The ids of an array with `gaps` are stored as an inverted index of their chunk: the keys id * 512 + row, row counted
from the chunk's first, sorted, each less the one before it, the first as it is. The gaps are small numbers, and an id
that many rows keep costs each of them little. Rows come back with rising ids.
"""

import math
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.codecs import blosc_options, chunk_codec
from todi_offline.cache.format.layout import CHUNK_TARGETS, ArraySpec

CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)
_ROW_BITS = CHUNK_TARGETS.bit_length() - 1
_ID_BITS = 32 - _ROW_BITS
_BLOSC_HEADER_BYTES = 16

Index = npt.NDArray[np.uint64]
"""[chunk, 2]: offset and bytes of the chunks that are stored."""


def encode_shard(spec: ArraySpec, values: npt.NDArray[Any], codec: str) -> bytes:
    """Return one shard of an array; rows beyond `values` read as 0."""
    assert len(values) <= spec.shard_rows, "the plan lets no shard overflow"
    starts = range(0, len(values), spec.chunk_rows)
    chunks = [_encode_chunk(spec, np.asarray(values[start:][: spec.chunk_rows], spec.dtype), codec) for start in starts]
    sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
    pairs = np.full((spec.chunks_per_shard, 2), _ABSENT)
    pairs[: len(chunks)] = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
    index = pairs.astype("<u8").tobytes()
    return b"".join([*chunks, index, crc_bytes(index)])


def _encode_chunk(spec: ArraySpec, rows: npt.NDArray[Any], codec: str) -> bytes:
    if len(rows) < spec.chunk_rows:
        rows = np.concatenate([rows, np.zeros(spec.shape(spec.chunk_rows - len(rows)), spec.dtype)])
    rows = np.ascontiguousarray(rows)
    body = bytes(chunk_codec(codec, spec.dtype).encode(_to_gaps(rows) if spec.gaps else rows))
    return body + crc_bytes(body)


def _to_gaps(ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Turn the ids [row, k] of a chunk into the gaps between its sorted keys, of the same shape."""
    keys = np.sort((ids << _ROW_BITS | np.arange(CHUNK_TARGETS, dtype=np.uint32)[:, None]).ravel())
    return np.diff(keys, prepend=np.uint32(0)).reshape(ids.shape)


def _from_gaps(gaps: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return the ids [row, k] of a chunk, rising along each row."""
    keys = np.cumsum(gaps, dtype=np.uint32)
    keys = np.sort(keys << _ID_BITS | keys >> _ROW_BITS)  # row above id: several times faster than argsort
    by_row: npt.NDArray[Any] = keys.reshape(gaps.shape)
    if (by_row >> _ID_BITS != np.arange(CHUNK_TARGETS)[:, None]).any():
        raise ValueError("its rows differ in length")
    return by_row & np.uint32(2**_ID_BITS - 1)


def chunk_sums(spec: ArraySpec, shard: bytes) -> bytes:
    """Return the CRC-32C of every stored chunk of a shard that `encode_shard` made, u32 in little-endian order."""
    index = parse_index(spec, shard[-index_bytes(spec) :], len(shard))
    return b"".join(shard[stop - CRC_BYTES : stop] for stop in index.sum(axis=1).tolist())


def index_bytes(spec: ArraySpec) -> int:
    """Return the size of a shard's index, its checksum included."""
    return spec.chunks_per_shard * 16 + CRC_BYTES


def parse_index(spec: ArraySpec, data: bytes, shard_bytes: int) -> Index:
    """Read the index at the end of a shard of so many bytes.

    Raises:
        ValueError: the index is damaged, leaves out a chunk before a stored one, or points outside the shard.
    """
    if len(data) < index_bytes(spec):
        raise ValueError(f"the shard is cut short: {shard_bytes} bytes, less than its index of {index_bytes(spec)}")
    if crc_bytes(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise ValueError("the checksum of its chunk index does not match")
    pairs = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(-1, 2)
    is_stored = (pairs != _ABSENT).any(axis=1)
    stored: Index = pairs[: int(is_stored.sum())]
    body = shard_bytes - index_bytes(spec)
    is_outside = (stored > body).any() or (stored.sum(axis=1) > body).any()
    if not is_stored[: len(stored)].all() or is_outside or (stored[:, 1] < CRC_BYTES).any():
        raise ValueError("its chunk index points outside the shard")
    return stored


def decode_chunk(spec: ArraySpec, data: bytes, codec: str, expected_crc: bytes | None = None) -> npt.NDArray[Any]:
    """Return the rows of a stored chunk; `expected_crc` tells it from other chunks.

    Raises:
        ValueError: the bytes of the chunk have changed.
    """
    body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if crc_bytes(body) != crc:
        raise ValueError("its checksum does not match")
    if expected_crc is not None and crc != expected_crc:
        raise ValueError("the chunk is intact but is not the one that the commit record describes")
    try:
        values = _decompress(spec, body, codec)
        return _from_gaps(values) if spec.gaps else values
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def largest_chunk_bytes(spec: ArraySpec) -> int:
    """Return more bytes than any codec makes of a chunk: the most that is read, whatever an index claims."""
    return 1024 + 2 * spec.dtype.itemsize * math.prod(spec.shape(spec.chunk_rows))


def crc_bytes(data: bytes) -> bytes:
    """Return the CRC-32C of data as it is stored."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _decompress(spec: ArraySpec, body: bytes, codec: str) -> npt.NDArray[Any]:
    """Decode a chunk into an array of the size that it must have; ignore the size that it claims."""
    values = np.empty(spec.shape(spec.chunk_rows), spec.dtype)
    if blosc_options(codec, spec.dtype):
        header = np.frombuffer(body[:_BLOSC_HEADER_BYTES], "<u4")  # blosc reads and writes as much as these claim
        if len(header) < 4 or (header[1], header[3]) != (values.nbytes, len(body)):
            raise ValueError("its size is not that of a chunk")
        chunk_codec(codec, spec.dtype).decode(body, values)
        return values
    from pcodec import standalone  # numcodecs does not say how much was decoded

    progress = standalone.simple_decompress_into(body, values.reshape(-1))
    if progress.n_processed != values.size or not progress.finished:
        raise ValueError("its size is not that of a chunk")
    return values
