"""A teacher and examples in; a cache, and beside it the teacher's whole logits at the targets, out.

The teacher's last hidden states are kept. Multiplied by the teacher's head they are its logits, in float32 and of every
id, in d / vocabulary of the bytes (576 numbers a target for 49,152). So an arm that learns from dense logits needs no
teacher, and its logits are not rounded.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks._study_losses import Batch, with_ids
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import ModelError
from todi_offline.models.head import Head
from todi_offline.teacher.in_transformers import Teacher

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class KeptTeacher:
    """A teacher's logits at the targets of a cache, by the number of the target."""

    hidden: Float[Tensor, "target d"]
    weight: Float[Tensor, "vocab d"]

    def logits(self, batch: Batch) -> Float[Tensor, "target vocab"]:
        """Return the logits at the targets of a batch of sequences that `numbered` returned."""
        return self.hidden[batch["ids"][:, 0].long()] @ self.weight.T


def open_kept(place: Path) -> KeptTeacher:
    """Return the logits that `keep` left beside the cache `place`."""
    hidden, weight = np.load(_beside(place), mmap_mode="c"), np.load(place.parent / "head.npy", mmap_mode="c")
    return KeptTeacher(torch.from_numpy(hidden), torch.from_numpy(weight))


def keep(teacher: Teacher, examples: Examples, place: Path, **settings: Any) -> None:
    """Capture examples into the cache `place` once, and keep the inputs of the teacher's head beside it.

    Raises:
        ModelError: the teacher's logits are not hidden states times a matrix.
    """
    if _beside(place).exists():
        return
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped; what its head read is lost
    head = teacher.head.module
    if not teacher.head.is_linear or head.bias is not None or teacher.head.scale != 1 or teacher.head.softcap:
        raise ModelError(f"the head of {type(teacher.model).__name__} is more than a matrix; take another teacher")
    recording = _Recording(teacher.model, runs_apart=True)
    capture(dataclasses.replace(teacher, head=recording), examples, place, encoding="f16", **settings)
    hidden = [recording.read_at(sequence) for sequence in open_cache(place)]
    np.save(place.parent / "head.npy", head.weight[: teacher.vocab_size].detach().numpy())
    whole = place.parent / "whole.npy"
    np.save(whole, np.concatenate(hidden))
    whole.replace(_beside(place))


def numbered(cache: Cache) -> list[CachedSequence]:
    """Return the sequences of a cache, with the number of each target in place of its ids."""
    numbers = np.arange(cache.num_targets.sum(), dtype=np.uint32)[:, None]
    parts = np.split(numbers, np.cumsum(cache.num_targets)[:-1])
    return [with_ids(sequence, part) for sequence, part in zip(cache, parts, strict=True)]


@dataclass(frozen=True, slots=True)
class _Recording(Head):
    """A teacher's head that keeps its inputs of every sequence."""

    recorded: dict[bytes, Array] = field(default_factory=dict)

    def hidden_states(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Return what the head reads at these positions."""
        hidden = Head.hidden_states(self, positions, **inputs)
        rows = positions // inputs["input_ids"].shape[1]
        for row, tokens in enumerate(inputs["input_ids"].numpy()):
            self.recorded[_content(tokens)] = hidden[rows == row].numpy()
        return hidden

    def read_at(self, sequence: CachedSequence) -> Array:
        """Return the inputs at the targets of a sequence; a batch is filled up with its last position."""
        return self.recorded[_content(sequence.token_ids)][: len(sequence.targets)]


def _content(tokens: Array) -> bytes:
    """Return a sequence's tokens without the zeros that pad it, or that end it: no two are alike but for those."""
    return np.trim_zeros(tokens.astype(np.uint32), "b").tobytes()


def _beside(place: Path) -> Path:
    return place.with_suffix(".npy")
