"""Rows in, the bytes of a Zarr shard out; and back, one chunk at a time, without Zarr.

What is on the disk is a plain `sharding_indexed` shard: the inner chunks, each followed by its CRC-32C, then an index
of (offset, bytes) pairs of u64 for each chunk, then the index's own CRC-32C. Reading one directly (the index once,
`pread` of the chunk, compare, decode) is many times faster than the general path; zarr-python is the oracle of both
directions in the tests.

The ids of an array with `gaps` are stored as an inverted index of their chunk: the keys id * 512 + row, row counted
from the chunk's first, sorted, each less the one before it, the first as it is. Who kept an id is then said by small
numbers, and an id that many rows keep costs each of them little. Rows come back with their ids rising.
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.layout import CHUNK_TARGETS, ArraySpec
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError

PCODEC_LEVEL = 8
_CRC_BYTES = 4
_ROW_BITS = CHUNK_TARGETS.bit_length() - 1
_ID_BITS = 32 - _ROW_BITS
_BLOSC_HEADER_BYTES = 16


def blosc_options(codec: str, dtype: np.dtype[np.generic]) -> dict[str, Any]:
    """Return the options of blosc for arrays of this dtype, or none where pcodec serves: it takes no single bytes."""
    if codec == "compact" and dtype.itemsize > 1:
        return {}
    shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    return {"cname": "lz4" if codec == "fast" else "zstd", "clevel": 5, "shuffle": shuffle}


def codec_name(dtype: np.dtype[np.generic], codec: str) -> str:
    """Return what compresses arrays of this dtype, for people."""
    options = blosc_options(codec, dtype)
    return f"blosc-{options['cname']}" if options else "pcodec"


def encode_shard(spec: ArraySpec, values: npt.NDArray[Any], codec: str) -> bytes:
    """Return one shard of an array; rows beyond `values` are 0."""
    assert len(values) <= spec.shard_rows, "the plan lets no shard overflow"
    chunks = []
    for start in range(0, spec.shard_rows, spec.chunk_rows):
        rows = np.ascontiguousarray(values[start : start + spec.chunk_rows], spec.dtype)
        chunks.append(_encode_chunk(spec, rows, codec) if len(rows) else _empty_chunk(spec, codec))
    sizes = np.array([len(chunk) for chunk in chunks], "<u8")
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
    return b"".join([*chunks, index, _crc(index)])


def _encode_chunk(spec: ArraySpec, rows: npt.NDArray[Any], codec: str) -> bytes:
    if len(rows) < spec.chunk_rows:
        rows = np.concatenate([rows, np.zeros(spec.shape(spec.chunk_rows - len(rows)), spec.dtype)])
    body = bytes(_codec(codec, spec.dtype).encode(_to_gaps(rows) if spec.gaps else rows))
    return body + _crc(body)


def _to_gaps(ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Turn the ids [row, k] of a chunk into the gaps between its sorted keys, of the same shape."""
    keys = np.sort((ids << _ROW_BITS | np.arange(CHUNK_TARGETS, dtype=np.uint32)[:, None]).ravel())
    return np.diff(keys, prepend=np.uint32(0)).reshape(ids.shape)


def _from_gaps(gaps: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return the ids [row, k] of a chunk, rising along each row."""
    keys = np.cumsum(gaps, dtype=np.uint32)
    keys = np.sort(keys << _ID_BITS | keys >> _ROW_BITS)  # row above id: several times faster than sorting places
    by_row: npt.NDArray[Any] = keys.reshape(gaps.shape)
    if (by_row >> _ID_BITS != np.arange(CHUNK_TARGETS)[:, None]).any():
        raise ValueError("its rows differ in length")
    return by_row & np.uint32(2**_ID_BITS - 1)


@lru_cache(maxsize=64)
def _empty_chunk(spec: ArraySpec, codec: str) -> bytes:
    return _encode_chunk(spec, np.zeros(spec.shape(0), spec.dtype), codec)


def chunk_sums(spec: ArraySpec, shard: bytes) -> bytes:
    """Return the CRC-32C of every chunk of a shard that `encode_shard` made, u32 in little-endian order."""
    index = np.frombuffer(shard[-_index_bytes(spec) : -_CRC_BYTES], "<u8").reshape(-1, 2)
    return b"".join(shard[stop - _CRC_BYTES : stop] for stop in index.sum(axis=1).tolist())


def _index_bytes(spec: ArraySpec) -> int:
    return spec.chunks_per_shard * 16 + _CRC_BYTES


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The object of one array in one shard; `codec` is a name of `layout.CODECS`."""

    path: Path
    spec: ArraySpec
    codec: str
    sums: bytes | None = None
    """What `chunk_sums` returned when it was written, to tell its chunks from those of another; None: any will do."""

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `start` to `stop` of the shard.

        Raises:
            CacheIncompleteError: the file is missing.
            CacheCorruptError: a chunk's bytes are not those that were written; names the file and the chunk.
        """
        if start == stop:
            return np.empty(self.spec.shape(0), self.spec.dtype)
        size = self.spec.chunk_rows
        chunks = [self.read_chunk(chunk) for chunk in range(start // size, (stop - 1) // size + 1)]
        rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        first = start // size * size
        return rows[start - first : stop - first]

    def read_chunk(self, chunk: int) -> npt.NDArray[Any]:
        """Return all rows of an inner chunk; the same errors as `read_rows`."""
        descriptor = self._open()
        try:
            offset, num_bytes = self._index(descriptor)[chunk].tolist()
            data = os.pread(descriptor, min(num_bytes, self._most_bytes), offset)
        except OSError as error:
            raise CacheError(f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return self._decode(data, num_bytes, chunk)

    @property
    def _most_bytes(self) -> int:
        """More than any codec makes of a chunk, whatever the index claims."""
        return 1024 + 2 * self.spec.dtype.itemsize * math.prod(self.spec.shape(self.spec.chunk_rows))

    def read_sums(self) -> bytes:
        """Return the CRC-32C of every chunk as it stands in the file; the same errors as `read_rows`."""
        descriptor = self._open()
        try:
            ends = self._index(descriptor).sum(axis=1).tolist()
            return b"".join(os.pread(descriptor, _CRC_BYTES, end - _CRC_BYTES) for end in ends)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe, there is nothing
        except FileNotFoundError as error:
            raise CacheIncompleteError(
                f"the cache lacks {self.path}; `todi-cache verify` lists what else is"
            ) from error
        except OSError as error:
            raise CacheError(f"cannot open {self.path}: {error.strerror}") from error

    def _index(self, descriptor: int) -> npt.NDArray[np.uint64]:
        status = os.fstat(descriptor)
        return _read_index(self.path, self.spec.chunks_per_shard, status.st_size, status.st_mtime_ns)

    def _decode(self, data: bytes, num_bytes: int, chunk: int) -> npt.NDArray[Any]:
        body = data[:-_CRC_BYTES]
        if len(data) < num_bytes or _crc(body) != data[-_CRC_BYTES:]:
            raise self._corrupt(chunk, "its checksum does not match")
        if self.sums is not None and data[-_CRC_BYTES:] != self.sums[chunk * _CRC_BYTES :][:_CRC_BYTES]:
            raise self._corrupt(chunk, "it is whole, but another than was written here")
        try:
            values = _decode_chunk(self.spec, body, self.codec)
            return _from_gaps(values) if self.spec.gaps else values
        except (ValueError, RuntimeError) as error:
            raise self._corrupt(chunk, str(error)) from error

    def _corrupt(self, chunk: int, why: str) -> CacheCorruptError:
        rows = f"rows {chunk * self.spec.chunk_rows} to {(chunk + 1) * self.spec.chunk_rows}"
        return CacheCorruptError(f"chunk {chunk} ({rows}) of {self.path} is damaged: {why}; run `todi-cache verify`")


def _decode_chunk(spec: ArraySpec, body: bytes, codec: str) -> npt.NDArray[Any]:
    """Decode a chunk into an array of the size that it must have; what it says of its own size is not believed."""
    values = np.empty(spec.shape(spec.chunk_rows), spec.dtype)
    if blosc_options(codec, spec.dtype):
        header = np.frombuffer(body[:_BLOSC_HEADER_BYTES], "<u4")  # blosc reads and writes as much as stands here
        if len(header) < 4 or (header[1], header[3]) != (values.nbytes, len(body)):
            raise ValueError("it is of another size than its place")
        _codec(codec, spec.dtype).decode(body, values)
        return values
    from pcodec import standalone  # numcodecs does not say how much was decoded

    progress = standalone.simple_decompress_into(body, values.reshape(-1))
    if progress.n_processed != values.size or not progress.finished:
        raise ValueError("it is of another size than its place")
    return values


@lru_cache(maxsize=4096)
def _read_index(path: Path, num_chunks: int, file_size: int, _modified_ns: int) -> npt.NDArray[np.uint64]:
    """Read offset and bytes of every chunk [chunk, 2]; kept for a file of this size and age."""
    index_bytes = num_chunks * 16 + _CRC_BYTES
    if file_size < index_bytes:
        raise CacheCorruptError(f"{path} is cut short: {file_size} bytes, less than its index of {index_bytes}")
    with path.open("rb") as file:
        file.seek(file_size - index_bytes)
        data = file.read(index_bytes)
    if _crc(data[:-_CRC_BYTES]) != data[-_CRC_BYTES:]:
        raise CacheCorruptError(f"the chunk index of {path} is damaged: its checksum does not match")
    pairs = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(num_chunks, 2)
    body = file_size - index_bytes
    if (pairs[:, 1] < _CRC_BYTES).any() or (pairs > body).any() or (pairs.sum(axis=1) > body).any():
        raise CacheCorruptError(f"the chunk index of {path} points outside the file")
    return pairs


@lru_cache(maxsize=16)
def _codec(codec: str, dtype: np.dtype[np.generic]) -> Any:
    from numcodecs import Blosc
    from numcodecs.pcodec import PCodec

    options = blosc_options(codec, dtype)
    if not options:
        return PCodec(level=PCODEC_LEVEL)
    return Blosc(options["cname"], options["clevel"], Blosc.SHUFFLE if options["shuffle"] == "shuffle" else 0)
