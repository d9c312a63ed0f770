"""The name of a model in, its parameters, bytes and FLOPs out, from the headers of its files: no weight is read."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from todi_offline.errors import ModelError, first_line
from todi_offline.models.weights import gguf_tensors_of, open_gguf, safetensors_of

_LAYER = re.compile(r"\.(\d+)\.")
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

ADAM_BYTES = 16
"""Bytes a parameter that AdamW trains in float32: the weight, its gradient and two moments."""

BACKWARD = 3.0
"""A training step's FLOPs in forward passes: the backward pass costs two."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch calls it; another name where the tensor is quantised."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is."""

    num_parameters: int
    num_body_parameters: int
    """Those that every token passes: all but the embedding and the head."""
    num_head_parameters: int
    """Those that every target passes as well; a tied head is the embedding."""
    num_layers: int
    hidden_size: int
    dtype: str
    """Of the weights once they are loaded: that of the files, float32 for GGUF."""
    file_bytes: int
    has_experts: bool
    """Whether it is a mixture of experts: a token passes only some, so FLOPs are an upper bound."""

    def weight_bytes(self, dtype: str = "auto") -> int:
        """Return the memory of the weights, loaded in `dtype`; `auto` is the dtype of the files."""
        return self.num_parameters * _BYTES.get(self.dtype if dtype == "auto" else dtype, 4)

    def forward_flops(self, num_tokens: npt.NDArray[np.int64], num_targets: int) -> float:
        """Return the FLOPs of a forward pass over sequences of these lengths, with the head at the targets alone.

        A parameter costs two FLOPs a token, and attention 2 x layers x length x width (Kaplan et al. 2020,
        arXiv:2001.08361, section 2.1).
        """
        lengths = num_tokens.astype(np.float64)
        attention = 2.0 * self.num_layers * self.hidden_size * float((lengths**2).sum())
        return 2.0 * (self.num_body_parameters * float(lengths.sum()) + self.num_head_parameters * num_targets) + (
            attention
        )


def read_size(name: str, vocab_size: int) -> ModelSize:
    """Return the size of a folder, hub id or GGUF file; its tokenizer knows `vocab_size` ids.

    Raises:
        ModelError: it has no header that can be read.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return _size(list(_gguf_headers(path)), vocab_size, dtype="float32")
        headers = list(_folder_headers(path) if path.exists() else _hub_headers(name))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(f"the headers of {name} cannot be read: {reason}; copy or download it again") from error
    return _size(headers or list(_built_headers(name)), vocab_size)


def _size(headers: list[Header], vocab_size: int, dtype: str | None = None) -> ModelSize:
    """Sum up headers; what lies outside the layers and has a row for every id is the embedding or the head."""
    tables = [
        header
        for header in headers
        if len(header.shape) == 2 and max(header.shape) >= vocab_size and not _LAYER.search(header.name)
    ]
    counts = {header.name: int(np.prod(header.shape, dtype=np.int64)) for header in headers}
    layers = {found[1] for header in headers if (found := _LAYER.search(header.name))}
    by_dtype = {each: sum(h.num_bytes for h in headers if h.dtype == each) for each in {h.dtype for h in headers}}
    total = sum(counts.values())
    return ModelSize(
        num_parameters=total,
        num_body_parameters=total - sum(counts[table.name] for table in tables),
        num_head_parameters=max((counts[table.name] for table in tables), default=0),
        num_layers=len(layers),
        hidden_size=max((min(table.shape) for table in tables), default=0),
        dtype=dtype or max(by_dtype, key=lambda each: by_dtype[each]),
        file_bytes=sum(header.num_bytes for header in headers),
        has_experts=any("expert" in header.name or "_exps" in header.name for header in headers),
    )


def _folder_headers(folder: Path) -> Iterator[Header]:
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in safetensors_of(file):
            yield _header(tensor.name, tensor.shape, tensor.dtype)


def _hub_headers(name: str) -> Iterator[Header]:
    """Yield the headers of a model of the hub: from its files where they are here, else a few kB of each."""
    from huggingface_hub import get_safetensors_metadata, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors"], local_files_only=True))
        if headers := list(_folder_headers(folder)):
            yield from headers
            return
    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except NotASafetensorsRepoError:
        return
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"the headers of {name} cannot be fetched from the hub: {first_line(error)}") from error
    for file in files:
        for tensor_name, tensor in file.tensors.items():
            yield _header(tensor_name, tensor.shape, tensor.dtype)


def _gguf_headers(file: Path) -> Iterator[Header]:
    for tensor in gguf_tensors_of(file, open_gguf(file)):
        yield Header(tensor.name, tensor.shape, tensor.dtype, tensor.stop - tensor.start)


def _built_headers(name: str) -> Iterator[Header]:
    """Yield what a model would have, for files without headers (`pytorch_model.bin`): built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for key, tensor in model.named_parameters():
        dtype = str(config.dtype or tensor.dtype).removeprefix("torch.")
        yield Header(key, tuple(tensor.shape), dtype, tensor.numel() * _BYTES.get(dtype, 4))


def _header(name: str, shape: Iterable[int], dtype: str) -> Header:
    shape = tuple(shape)
    bits = int(digits[0]) if (digits := re.findall(r"\d+", dtype)) else 8
    return Header(name, shape, _DTYPES.get(dtype, dtype), int(np.prod(shape, dtype=np.int64)) * bits // 8)
