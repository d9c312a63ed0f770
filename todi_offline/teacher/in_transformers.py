"""Batches of examples in, the teacher's sparse targets at their supervised positions out."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.cache.format.fingerprint import hash_bytes, hash_json
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example
from todi_offline.errors import ConfigError, ModelError, TeacherOutputError
from todi_offline.models.checkpoint import (
    SAMPLED_TENSOR_BYTES,
    checkpoint_fingerprint,
    identity_of_adapter,
    identity_of_config,
    sampled_ranges,
)
from todi_offline.models.head import Head, in_dtype, tried_head
from todi_offline.models.loading import Model, Tokenizer, evaluation_mode, load_model, load_tokenizer, real_vocab_size
from todi_offline.targets.host_copy import queued_to
from todi_offline.targets.rows import MIN_ROWS, QueuedRows, chunk_rows, filled_up, located, queue_chunks, tail_uniforms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher, and where and how it runs."""

    teacher: str
    """The teacher: a folder, a hub id, or a GGUF file."""
    device: str = "auto"
    """Device of the teacher: auto, cpu, cuda, cuda:N or mps; `auto` takes an accelerator if there is one."""
    dtype: str = "auto"
    """Dtype of the weights: float32, bfloat16 or float16; `auto` keeps the dtype of the files."""
    head_dtype: str | None = None
    """Dtype of the head alone. In float32, the head of a bfloat16 teacher does not round its logits to 8 bits."""
    device_map: str | None = None
    """How transformers spreads a large teacher over the devices of one process: `auto` puts layer after layer on them,
    so one device is busy at a time and the others wait. With `tp`, all devices are busy."""
    tp: int = 1
    """Number of ranks over which each layer is split: `torchrun --nproc-per-node 8 -m todi_offline capture --tp 8 ...`.
    The teacher needs a `tp_plan` in transformers."""
    attention: str | None = None
    """Attention of transformers (`attn_implementation`), such as `sdpa`."""
    adapter: str | None = None
    """A peft adapter to add to the teacher: a folder or hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    batch_tokens: int = 4096
    """Tokens in one forward pass, padding included."""

    def __post_init__(self) -> None:
        """Refuse numbers and dtypes that make no sense, and two ways to spread a teacher.

        Raises:
            ConfigError: a value is out of range or contradicts another.
        """
        for name in ("batch_tokens", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.tp > 1 and self.device_map:
            raise ConfigError("tp and device_map are two ways to spread a teacher over devices; leave out one of them")
        if self.head_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"head_dtype is {self.head_dtype!r}; expected float32, bfloat16 or float16, or none")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a teacher was loaded from, which identifies it."""

    path: str
    adapter: str | None
    trust_remote_code: bool
    """Whether the code that comes with the model is run, and identifies it too."""

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the files; see `checkpoint_fingerprint`."""
        return checkpoint_fingerprint(self.path, self.adapter, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A loaded teacher: what `capture` needs of it."""

    model: Model
    tokenizer: Tokenizer
    vocab_size: int
    """Ids that tokenizer and head know; logits beyond pad the embedding and are dropped."""
    head: Head
    checkpoint: Checkpoint | None = None
    """What it was loaded from; None where the model was handed over in memory."""


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load a teacher with its tokenizer and adapters.

    Raises:
        ModelError: a part cannot be loaded, or they do not belong together.
    """
    tokenizer = load_tokenizer(config.teacher, trust_remote_code=config.trust_remote_code)
    model = load_model(
        config.teacher,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        tp=config.tp,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
    if config.adapter:
        model = _with_adapter(model, config.adapter)
    checkpoint = Checkpoint(config.teacher, config.adapter, config.trust_remote_code)
    teacher = dataclasses.replace(as_teacher(model, tokenizer), checkpoint=checkpoint)
    if config.head_dtype is None:
        return teacher
    return dataclasses.replace(teacher, head=in_dtype(teacher.head, getattr(torch, config.head_dtype)))


def as_teacher(model: Model, tokenizer: Tokenizer) -> Teacher:
    """Make a teacher of a model that is already loaded; its weights in memory identify it."""
    head = tried_head(model)
    return Teacher(model, tokenizer, real_vocab_size(tokenizer, head.num_ids), head)


def padded_length(num_tokens: int, num_positions: int | None = None) -> int:
    """Return the length to pad a sequence to: the next multiple of an eighth of the power of two below it.

    The multiple is at least 8 tokens, and the length at least 16. The length depends on the sequence alone, because the
    rounding of a kernel may depend on the length. It never exceeds the positions that the model has.
    """
    step = 1 << max(3, (num_tokens - 1).bit_length() - 4)
    padded = max(-(-num_tokens // step) * step, MIN_ROWS)
    return padded if num_positions is None else max(num_tokens, min(padded, num_positions))


def length_batches(num_tokens: Sequence[int], batch_tokens: int, num_positions: int | None = None) -> list[list[int]]:
    """Group sequences of one padded length so that a batch holds at most `batch_tokens` tokens.

    A sequence longer than that is a batch by itself. Longest first, so that memory runs out at once or never.
    """
    lengths = [padded_length(number, num_positions) for number in num_tokens]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        batch = batches[-1] if batches else []
        if batch and lengths[batch[0]] == lengths[index] and (len(batch) + 1) * lengths[index] <= batch_tokens:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def num_positions(teacher: Teacher) -> int | None:
    """Return how many positions the teacher has, where its config says so."""
    return getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True, slots=True)
class QueuedTargets:
    """The targets of a batch of examples, which the teacher's device may still be computing."""

    rows: QueuedRows
    sources: list[tuple[str, npt.NDArray[np.int64]]]
    """The id and the supervised positions of each example."""

    def read(self) -> list[TargetRows]:
        """Wait for the device, and return the targets of each example.

        Raises:
            TeacherOutputError: a logit is NaN or +inf; names the example and the position.
        """
        try:
            rows = self.rows.read()
        except TeacherOutputError as error:
            raise located(error, self.sources) from error
        ends = np.cumsum([len(positions) for _, positions in self.sources])
        return [
            rows[int(end) - len(positions) : int(end)] for end, (_, positions) in zip(ends, self.sources, strict=True)
        ]


def targets_of(teacher: Teacher, examples: Sequence[Example], settings: CacheSettings) -> list[TargetRows]:
    """Return the targets of each example of one batch: those of `queue_targets`, read at once.

    Raises:
        TeacherOutputError: a logit is NaN or +inf; names the example and the position.
    """
    return queue_targets(teacher, examples, settings).read()


def queue_targets(teacher: Teacher, examples: Sequence[Example], settings: CacheSettings) -> QueuedTargets:
    """Run the teacher over one batch, padded on the right, as far as the host need not wait for the results.

    Padding needs no mask: a causal model never looks to the right. On a CPU, a sequence of a batch of `length_batches`
    has the same bits whatever else is in the batch: each row of a matrix product is summed in the same order, unless
    there are very few rows, so products have at least 16. A GPU's kernels choose an order by the number of rows, so
    targets are the same up to rounding there.

    The head and the targets make the host wait for nothing on a CUDA device. A model may: transformers reads once,
    before the first layer, whether the sequences are packed, so the host waits there for the batch before.
    """
    device = teacher.model.get_input_embeddings().weight.device
    length = padded_length(max(len(example.token_ids) for example in examples), num_positions(teacher))
    input_ids = np.zeros((len(examples), length), np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.token_ids)] = example.token_ids
    columns = [np.flatnonzero(example.target_mask) for example in examples]
    positions = filled_up([row * length + column for row, column in enumerate(columns)])
    labels = torch.from_numpy(input_ids.reshape(-1)[positions + 1])
    uniforms = filled_up([tail_uniforms(example, settings) for example in examples])
    with evaluation_mode(teacher.model):
        there = queued_to(torch.from_numpy(positions), teacher.head.device)
        chunks = _logit_chunks(teacher, queued_to(torch.from_numpy(input_ids), device), there)
        rows = queue_chunks(chunks, labels, torch.from_numpy(uniforms), settings)
    return QueuedTargets(rows, [(example.id, column) for example, column in zip(examples, columns, strict=True)])


def teacher_fingerprint(teacher: Teacher) -> dict[str, Any]:
    """Return what identifies a teacher, and the dtype in which it runs.

    Of a teacher that was loaded from a checkpoint see `checkpoint_fingerprint`; of one that was handed over in memory
    the same is taken from its weights there, with other hashes.

    Raises:
        ModelError: the files of the checkpoint cannot be read, or weights in memory are on no device.
    """
    dtypes = {"dtype": _name(teacher.model.dtype)}
    if teacher.head.stand_in is not None:
        dtypes["head_dtype"] = _name(teacher.head.stand_in.weight.dtype)
    found = teacher.checkpoint.fingerprint() if teacher.checkpoint else _memory_fingerprint(teacher.model)
    return {**found, **dtypes}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_fingerprint(model: Model) -> dict[str, Any]:
    tensors = sorted(model.state_dict().items())
    if any(tensor.is_meta for _, tensor in tensors):
        raise ModelError(
            "some weights of the teacher are offloaded, so that they cannot be fingerprinted in memory; name the path "
            "of its checkpoint instead: capture(teacher=PATH), or load_teacher(TeacherConfig(teacher=PATH))"
        )
    adapters = getattr(model, "peft_config", {})
    return {
        "model_type": model.config.model_type,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": hash_json(identity_of_config(model.config.to_dict())),
        "weights": hash_bytes(piece for name, tensor in tensors for piece in _tensor_pieces(name, tensor)),
        "sampled_tensors": [name for name, tensor in tensors if tensor.nbytes > SAMPLED_TENSOR_BYTES],
        "adapters": {name: hash_json(identity_of_adapter(value.to_dict())) for name, value in adapters.items()},
    }


def tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """Return a tokenizer as `tokenizers` reads it, or None where it has no such form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def _logit_chunks(
    teacher: Teacher, input_ids: Int[Tensor, "batch seq"], positions: Int[Tensor, " target"]
) -> Iterator[Float[Tensor, "chunk vocab"]]:
    rows = chunk_rows(teacher.vocab_size, teacher.head.device)
    for logits in teacher.head.chunks(positions, rows, input_ids=input_ids):
        yield logits[:, : teacher.vocab_size]


def _tensor_pieces(name: str, tensor: Tensor) -> Iterator[bytes]:
    yield f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start, stop in sampled_ranges(flat.numel()):
        yield flat[start:stop].cpu().numpy().tobytes()


def _with_adapter(model: Model, adapter: str) -> Model:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs peft: pip install 'todi-offline[lora]'") from error
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter} cannot be loaded as an adapter of the teacher: {error}") from error
