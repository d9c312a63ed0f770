"""A file of weights in; out comes where each of its tensors lies, from the header: no weight is read."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi_offline.errors import ModelError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the file calls it: F32 in safetensors, Q4_K in GGUF."""
    file: Path
    start: int
    """The first byte."""
    stop: int
    """The byte behind the last."""

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


def safetensors_of(file: Path) -> list[StoredTensor]:
    """Return the tensors of a file of safetensors: 8 bytes with the header's length, the header in JSON, the data.

    Raises:
        ValueError: the header cannot be read, or the file ends before the tensors that it names.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size - 8:
                raise ValueError("it ends before its header does")
            header: dict[str, Any] = json.loads(opened.read(length))
        tensors = [_stored(file, 8 + length, *item) for item in header.items() if item[0] != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if any(tensor.stop > size for tensor in tensors):
        raise ValueError(f"{file} is damaged: it ends before the tensors that its header names")
    return tensors


def _stored(file: Path, start: int, name: str, values: Any) -> StoredTensor:
    first, behind = values["data_offsets"]
    return StoredTensor(name, tuple(values["shape"]), values["dtype"], file, start + first, start + behind)


def open_gguf(file: Path) -> Any:
    """Return a reader of a GGUF file.

    Raises:
        ModelError: the package that reads such files is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("a GGUF file needs gguf: pip install 'todi-offline[gguf]'") from error
    return GGUFReader(file)


def gguf_tensors_of(file: Path, reader: Any) -> list[StoredTensor]:
    """Return the tensors of a GGUF file that `open_gguf` has opened."""
    return [
        StoredTensor(
            tensor.name,
            tuple(tensor.shape.tolist()),
            tensor.tensor_type.name,
            file,
            int(tensor.data_offset),
            int(tensor.data_offset) + int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    ]
