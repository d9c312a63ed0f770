"""The path of a checkpoint in, hashes that identify its model out: from its files, without loading the model.

A path is a folder, a hub id or a GGUF file. The files are read once: the fingerprint is kept below the user's cache
folder, under the paths, sizes and times of the files.
"""

import json
import logging
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from todi_offline.cache.format.fingerprint import hash_bytes, hash_json
from todi_offline.errors import ModelError, first_line
from todi_offline.folders import user_cache

logger = logging.getLogger(__name__)

SAMPLED_TENSOR_BYTES = 256 * 2**20
"""Of larger tensors every n-th block is hashed, so that about as many bytes are."""
BLOCK_BYTES = 2**20

_SCHEME = 1  # of what is hashed; another number forgets the fingerprints that are kept
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NOT_IDENTITY = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")  # of a model's config
_NOT_ADAPTER_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def checkpoint_fingerprint(path: str, adapter: str | None = None) -> dict[str, Any]:
    """Return what identifies the model of a checkpoint, and of an adapter (peft) that it wears.

    Hashes of its config, its weights and its adapter, and for people its kind and its number of parameters. A copy in
    another folder has the same fingerprint, and so has one in shards of another size; a fine-tune of one layer has
    another. Of tensors beyond 256 MiB every n-th block of 1 MiB is hashed, always the first and the last;
    `sampled_tensors` names them. The dtype in which the model runs is not a property of the checkpoint, and not part
    of the fingerprint: whatever runs the model adds it.

    Raises:
        ModelError: there is no such checkpoint or adapter, or its files cannot be read.
    """
    files = _files(path, adapter)
    kept = _kept_at(files)
    try:
        found: dict[str, Any] = json.loads(kept.read_bytes())
        return found
    except (OSError, ValueError):
        pass
    try:
        found = _fingerprint(files)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(
            f"the files of {path} cannot be read as a checkpoint: {first_line(error)}; fetch or save it again"
        ) from error
    _keep(kept, found)
    return found


def locate(path: str) -> Path | None:
    """Return the folder or GGUF file at a path; None for a hub id.

    Raises:
        ModelError: nothing is at the path, and the path cannot be a hub id.
    """
    file = Path(path).expanduser()
    if file.suffix == ".gguf" and not file.is_file():
        raise ModelError(f"there is no file {path}; name a GGUF file, a folder with a model, or a hub id")
    if not file.exists() and (path.startswith((".", "~", "/")) or path.endswith("/") or path.count("/") > 1):
        raise ModelError(f"there is no folder {path}; name a folder with a model, a GGUF file, or a hub id")
    return file if file.exists() else None


def identity_of_config(config: Any) -> Any:
    """Return of a model's config, and of the configs within it, what decides its logits."""
    if not isinstance(config, Mapping):
        return config
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY and not str(key).startswith("_")}
    return {key: identity_of_config(value) for key, value in kept.items()}


def identity_of_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the logits of an adapter's config; its module names are a set, which has no order."""
    return {
        key: sorted(value) if isinstance(value, set | list) and all(isinstance(item, str) for item in value) else value
        for key, value in config.items()
        if key not in _NOT_ADAPTER_IDENTITY
    }


def sampled_ranges(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield where the blocks begin and end that are hashed of a tensor of that size."""
    step = max(1, -(-num_bytes // SAMPLED_TENSOR_BYTES)) * BLOCK_BYTES
    for start in sorted({*range(0, num_bytes, step), max(0, num_bytes - BLOCK_BYTES)}):
        yield start, min(start + BLOCK_BYTES, num_bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files that decide a model's logits; a GGUF file is its own config."""

    config: Path
    weights: tuple[Path, ...]
    adapter_config: Path | None = None
    adapter_weights: tuple[Path, ...] = ()

    def all(self) -> list[Path]:
        return [self.config, *self.weights, *filter(None, (self.adapter_config,)), *self.adapter_weights]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies in a file; a file whose tensors are unknown here is one tensor of bytes."""

    name: str
    kind: str
    file: Path
    start: int
    stop: int
    num_elements: int | None = None


def _files(path: str, adapter: str | None) -> _Files:
    place = locate(path)
    if place is not None and place.is_file():
        files = _Files(place, (place,))
    else:
        config, own_adapter = _find(path, "config.json"), _find(path, "adapter_config.json")
        if adapter is None and own_adapter is not None:  # transformers loads its base, and puts it on
            adapter = path
        if config is None and own_adapter is not None:
            return _files(json.loads(own_adapter.read_bytes())["base_model_name_or_path"], adapter)
        if config is None:
            raise ModelError(f"{path} has no config.json; name a folder with a model, a GGUF file, or a hub id")
        files = _Files(config, _weights(path, _WEIGHTS))
    if adapter is None:
        return files
    adapter_config = _find(adapter, "adapter_config.json")
    if adapter_config is None:
        raise ModelError(f"{adapter} cannot be loaded as an adapter: it has no adapter_config.json")
    return _Files(files.config, files.weights, adapter_config, _weights(adapter, _ADAPTER_WEIGHTS))


def _find(path: str, name: str) -> Path | None:
    """Return a file of a folder or of a hub id, which is fetched where it is not here yet."""
    if (place := locate(path)) is not None:
        return place / name if (place / name).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be fetched: {first_line(error)}") from error
    return None if found is None else Path(found)


def _weights(path: str, names: Sequence[str]) -> tuple[Path, ...]:
    for name in names:
        if (whole := _find(path, name)) is not None:
            return (whole,)
        if (index := _find(path, f"{name}.index.json")) is not None:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            found = [_find(path, shard) for shard in shards]
            if missing := [shard for shard, file in zip(shards, found, strict=True) if file is None]:
                raise ModelError(f"{path} lacks {', '.join(missing)}, which its index names; fetch it again")
            return tuple(file for file in found if file is not None)
    raise ModelError(f"{path} has no weights; expected {' or '.join(names)}")


def _fingerprint(files: _Files) -> dict[str, Any]:
    facts, tensors = _gguf(files.config) if files.config.suffix == ".gguf" else _config(files)
    adapters = {}
    if files.adapter_config is not None:
        settings = json.loads(files.adapter_config.read_bytes())
        adapters["default"] = hash_json([identity_of_adapter(settings), _hash(_tensors(files.adapter_weights))])
    counts = [tensor.num_elements for tensor in tensors]
    known = [count for count in counts if count is not None]
    return {
        "identified_by": "files",
        **facts,
        **({"num_parameters": sum(known)} if len(known) == len(counts) else {}),
        "weights": _hash(tensors),
        "sampled_tensors": [item.name for item in tensors if item.stop - item.start > SAMPLED_TENSOR_BYTES],
        "adapters": adapters,
    }


def _config(files: _Files) -> tuple[dict[str, Any], list[_Tensor]]:
    config = json.loads(files.config.read_bytes())
    facts = {"model_type": config.get("model_type"), "config": hash_json(identity_of_config(config))}
    return facts, _tensors(files.weights)


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


def _gguf(file: Path) -> tuple[dict[str, Any], list[_Tensor]]:
    """Read a GGUF file; its config is all that stands before the tensors, the tokenizer too."""
    reader = open_gguf(file)
    with file.open("rb") as opened:
        header = hash_bytes([opened.read(reader.data_offset)])
    kind = reader.fields.get("general.architecture")
    tensors = [
        _Tensor(
            tensor.name,
            f"{tuple(tensor.shape.tolist())} {tensor.tensor_type.name}",
            file,
            int(tensor.data_offset),
            int(tensor.data_offset) + int(tensor.n_bytes),
            int(tensor.n_elements),
        )
        for tensor in reader.tensors
    ]
    return {"model_type": kind and str(kind.contents()), "config": header}, _by_name(tensors)


def _tensors(files: Sequence[Path]) -> list[_Tensor]:
    """Return the tensors of some files, in whichever of them each lies."""
    return _by_name(
        tensor for file in files for tensor in (_safetensors if file.suffix == ".safetensors" else _whole)(file)
    )


def _by_name(tensors: Iterable[_Tensor]) -> list[_Tensor]:
    return sorted(tensors, key=lambda tensor: tensor.name)


def _safetensors(file: Path) -> list[_Tensor]:
    """Read the header of a file of safetensors: its length in 8 bytes, JSON; the data follow."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    start = 8 + length
    return [
        _Tensor(
            name,
            f"{tuple(values['shape'])} {values['dtype']}",
            file,
            start + values["data_offsets"][0],
            start + values["data_offsets"][1],
            math.prod(values["shape"]),
        )
        for name, values in header.items()
        if name != "__metadata__"
    ]


def _whole(file: Path) -> list[_Tensor]:
    return [_Tensor(file.name, "file", file, 0, file.stat().st_size)]


def _hash(tensors: Sequence[_Tensor]) -> str:
    return hash_bytes(piece for tensor in tensors for piece in _pieces(tensor))


def _pieces(tensor: _Tensor) -> Iterator[bytes]:
    yield f"{tensor.name} {tensor.kind}\n".encode()
    with tensor.file.open("rb", buffering=0) as file:
        for start, stop in sampled_ranges(tensor.stop - tensor.start):
            yield _read(file, tensor.start + start, stop - start)


def _read(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise ValueError(f"{file.name} ends before the tensors that its header names")
    return data


def _kept_at(files: _Files) -> Path:
    """Return where the fingerprint of these files, as they are now, is kept."""
    status = [(str(file.resolve()), file.stat()) for file in files.all()]
    state = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
    return user_cache("fingerprints", f"{hash_json([_SCHEME, SAMPLED_TENSOR_BYTES, BLOCK_BYTES, state])}.json")


def _keep(place: Path, found: Mapping[str, Any]) -> None:
    """Write a fingerprint in one step; where that cannot be done, it is computed again the next time."""
    new = place.with_suffix(f".{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(place)
    except OSError as error:
        logger.info("the fingerprint of the teacher cannot be kept in %s: %s", place.parent, error)
