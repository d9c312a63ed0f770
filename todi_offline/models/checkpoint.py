"""The path of a checkpoint in, hashes that identify its model out: from its files, without loading the model.

A path is a folder, a hub id or a GGUF file. The files are read once: the fingerprint is kept below the user's cache
folder, under the paths, sizes and times of the files.

Code that comes with a model and that the user trusts decides the logits too. The config's `auto_map` names its modules
(transformers, "Building custom models"), and a module imports others of its folder.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from todi_offline.cache.format.fingerprint import hash_bytes, hash_json
from todi_offline.errors import ModelError, first_line
from todi_offline.folders import user_cache
from todi_offline.models.weights import StoredTensor, gguf_tensors_of, open_gguf, safetensors_of

logger = logging.getLogger(__name__)

SAMPLED_TENSOR_BYTES = 256 * 2**20
"""Of larger tensors every n-th block is hashed, so that about as many bytes are."""
BLOCK_BYTES = 2**20

_SCHEME = 1  # of what is hashed; another number forgets the fingerprints that are kept
_WHOLE = "file"  # the dtype of a file that is hashed as it is
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NOT_IDENTITY = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")  # of a model's config
_NOT_ADAPTER_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def checkpoint_fingerprint(path: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what identifies the model of a checkpoint, and of an adapter (peft) that it wears.

    Hashes of its config, its weights and its adapter, and for people its kind and its number of parameters. With
    `trust_remote_code`, a hash of the code that comes with the model, where there is some. A copy in
    another folder has the same fingerprint, and so has one in shards of another size; a fine-tune of one layer has
    another. Of tensors beyond 256 MiB every n-th block of 1 MiB is hashed, always the first and the last;
    `sampled_tensors` names them. The dtype in which the model runs is not a property of the checkpoint, and not part
    of the fingerprint: whatever runs the model adds it.

    Raises:
        ModelError: there is no such checkpoint or adapter, or its files cannot be read.
    """
    files = _files(path, adapter, trust_remote_code=trust_remote_code)
    kept = _kept_at(files)
    try:
        found: dict[str, Any] = json.loads(kept.read_bytes())
        return found
    except (OSError, ValueError):
        pass
    try:
        found = _fingerprint(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    code: tuple[Path, ...] = ()

    def all(self) -> list[Path]:
        adapter = [*filter(None, (self.adapter_config,)), *self.adapter_weights]
        return [self.config, *self.weights, *adapter, *self.code]


def _files(path: str, adapter: str | None, *, trust_remote_code: bool) -> _Files:
    place = locate(path)
    if place is not None and place.is_file():
        files = _Files(place, (place,))
    else:
        config, own_adapter = _find(path, "config.json"), _find(path, "adapter_config.json")
        if adapter is None and own_adapter is not None:  # transformers loads its base, and puts it on
            adapter = path
        if config is None and own_adapter is not None:
            base = json.loads(own_adapter.read_bytes())["base_model_name_or_path"]
            return _files(base, adapter, trust_remote_code=trust_remote_code)
        if config is None:
            raise ModelError(f"{path} has no config.json; name a folder with a model, a GGUF file, or a hub id")
        code = _code(path, config) if trust_remote_code else ()
        files = _Files(config, _weights(path, _WEIGHTS), code=code)
    if adapter is None:
        return files
    adapter_config = _find(adapter, "adapter_config.json")
    if adapter_config is None:
        raise ModelError(f"{adapter} cannot be loaded as an adapter: it has no adapter_config.json")
    return replace(files, adapter_config=adapter_config, adapter_weights=_weights(adapter, _ADAPTER_WEIGHTS))


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


def _code(path: str, config: Path) -> tuple[Path, ...]:
    """Return the modules that a config's `auto_map` names, and those that they import relatively, sorted by name.

    Values of `auto_map` are `module.Class`, or `repository--module.Class` for the code of another repository.
    """
    try:
        values = json.loads(config.read_bytes()).get("auto_map", {}).values()
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read as a config: {first_line(error)}; fetch or save it again") from error
    if not values:
        return ()
    from transformers.dynamic_module_utils import get_relative_imports

    named = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    waiting = [(name.rpartition("--")[0] or path, _module_file(name.rpartition("--")[2])) for name in named]
    found: dict[tuple[str, str], Path] = {}
    while waiting:
        place, name = waiting.pop()
        file = None if (place, name) in found else _find(place, name)
        if file is not None:  # without a file of the model's, transformers itself names it
            found[place, name] = file
            folder = PurePosixPath(name).parent
            waiting += [(place, str(folder / f"{each.replace('.', '/')}.py")) for each in get_relative_imports(file)]
    return tuple(file for _, file in sorted((name, file) for (_, name), file in found.items()))


def _module_file(class_name: str) -> str:
    return f"{class_name.rpartition('.')[0].replace('.', '/')}.py"


def _fingerprint(files: _Files) -> dict[str, Any]:
    facts, tensors = _gguf(files.config) if files.config.suffix == ".gguf" else _config(files)
    adapters = {}
    if files.adapter_config is not None:
        settings = json.loads(files.adapter_config.read_bytes())
        adapters["default"] = hash_json([identity_of_adapter(settings), _hash(_tensors(files.adapter_weights))])
    are_known = all(tensor.dtype != _WHOLE for tensor in tensors)
    return {
        "identified_by": "files",
        **facts,
        **({"num_parameters": sum(tensor.num_elements for tensor in tensors)} if are_known else {}),
        "weights": _hash(tensors),
        "sampled_tensors": [item.name for item in tensors if item.stop - item.start > SAMPLED_TENSOR_BYTES],
        "adapters": adapters,
        **({"code": hash_bytes(piece for file in files.code for piece in _named(file))} if files.code else {}),
    }


def _named(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    yield f"{file.name} {len(data)}\n".encode()
    yield data


def _config(files: _Files) -> tuple[dict[str, Any], list[StoredTensor]]:
    config = json.loads(files.config.read_bytes())
    facts = {"model_type": config.get("model_type"), "config": hash_json(identity_of_config(config))}
    return facts, _tensors(files.weights)


def _gguf(file: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Read a GGUF file; its config is all that stands before the tensors, the tokenizer too."""
    reader = open_gguf(file)
    with file.open("rb") as opened:
        header = hash_bytes([opened.read(reader.data_offset)])
    kind = reader.fields.get("general.architecture")
    tensors = _by_name(gguf_tensors_of(file, reader))
    return {"model_type": kind and str(kind.contents()), "config": header}, tensors


def _tensors(files: Sequence[Path]) -> list[StoredTensor]:
    """Return the tensors of some files, in whichever of them each lies."""
    return _by_name(
        tensor for file in files for tensor in (safetensors_of if file.suffix == ".safetensors" else _whole)(file)
    )


def _by_name(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    return sorted(tensors, key=lambda tensor: tensor.name)


def _whole(file: Path) -> list[StoredTensor]:
    """Return a file whose tensors are unknown here as one tensor of bytes."""
    size = file.stat().st_size
    return [StoredTensor(file.name, (size,), _WHOLE, file, 0, size)]


def _hash(tensors: Sequence[StoredTensor]) -> str:
    return hash_bytes(piece for tensor in tensors for piece in _pieces(tensor))


def _pieces(tensor: StoredTensor) -> Iterator[bytes]:
    kind = _WHOLE if tensor.dtype == _WHOLE else f"{tensor.shape} {tensor.dtype}"
    yield f"{tensor.name} {kind}\n".encode()
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
        logger.info("the fingerprint of the teacher cannot be saved in %s: %s", place.parent, error)
