"""The file of a Zarr shard in, its rows out.

Reading it directly (the index once, `pread` of the chunk, compare, decode) is many times faster than zarr-python.
"""

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.layout import ArraySpec
from todi_offline.cache.format.shard import (
    CRC_BYTES,
    Index,
    decode_chunk,
    index_bytes,
    largest_chunk_bytes,
    parse_index,
)
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The object of one array in one shard; `codec` is a name of `layout.CODECS`."""

    path: Path
    spec: ArraySpec
    codec: str
    sums: bytes | None = None
    """The sums of the stored chunks, from the commit record; None accepts any intact chunk."""

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `start` to `stop` of the shard.

        Raises:
            CacheIncompleteError: the file is missing.
            CacheCorruptError: the bytes of a chunk have changed; names the file and the chunk.
            CacheError: the disk cannot read it.
        """
        if start == stop:
            return np.empty(self.spec.shape(0), self.spec.dtype)
        size = self.spec.chunk_rows
        chunks = [self.read_chunk(chunk) for chunk in range(start // size, (stop - 1) // size + 1)]
        rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        first = start // size * size
        return rows[start - first : stop - first]

    def read_chunk(self, chunk: int) -> npt.NDArray[Any]:
        """Return all rows of an inner chunk, zeros where it is absent; the same errors as `read_rows`."""
        descriptor = self._open()
        try:
            index = self._index(descriptor)
            if chunk >= len(index):
                return np.zeros(self.spec.shape(self.spec.chunk_rows), self.spec.dtype)
            offset, num_bytes = index[chunk].tolist()
            data = os.pread(descriptor, min(num_bytes, largest_chunk_bytes(self.spec)), offset)
        except OSError as error:
            raise CacheError(f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        expected = None if self.sums is None else self.sums[chunk * CRC_BYTES :][:CRC_BYTES]
        try:
            if len(data) < num_bytes:
                raise ValueError("it is cut short")
            return decode_chunk(self.spec, data, self.codec, expected)
        except ValueError as error:
            rows = f"rows {chunk * self.spec.chunk_rows} to {(chunk + 1) * self.spec.chunk_rows}"
            raise CacheCorruptError(
                f"chunk {chunk} ({rows}) of {self.path} is damaged: {error}; run `todi-cache verify`"
            ) from error

    def read_sums(self) -> bytes:
        """Return the CRC-32C of every stored chunk as the file has it; the same errors as `read_rows`."""
        descriptor = self._open()
        try:
            ends = self._index(descriptor).sum(axis=1).tolist()
            return b"".join(os.pread(descriptor, CRC_BYTES, end - CRC_BYTES) for end in ends)
        except OSError as error:
            raise CacheError(f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait
        except FileNotFoundError as error:
            raise CacheIncompleteError(
                f"the cache lacks {self.path}; `todi-cache verify` lists every missing object"
            ) from error
        except OSError as error:
            raise CacheError(f"cannot open {self.path}: {error.strerror}") from error

    def _index(self, descriptor: int) -> Index:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"cannot read {self.path}: it is not a regular file")
        index = _read_index(self.path, self.spec, status.st_size, status.st_mtime_ns)
        if self.sums is not None and len(index) * CRC_BYTES != len(self.sums):
            raise CacheCorruptError(
                f"{self.path} holds {len(index)} chunks, and its commit record describes "
                f"{len(self.sums) // CRC_BYTES}; run `todi-cache verify`"
            )
        return index


@lru_cache(maxsize=4096)
def _read_index(path: Path, spec: ArraySpec, file_size: int, _modified_ns: int) -> Index:
    """Read the index of a shard; the result is kept for a file of this size and age."""
    with path.open("rb") as file:
        file.seek(max(file_size - index_bytes(spec), 0))
        data = file.read(index_bytes(spec))
    try:
        return parse_index(spec, data, file_size)
    except ValueError as error:
        raise CacheCorruptError(f"{path} is damaged: {error}; run `todi-cache verify`") from error
