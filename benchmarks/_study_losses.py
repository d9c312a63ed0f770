"""An arm of the study and its targets in, the losses of its training steps out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pcodec.standalone
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks._study_arms import Arm
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache
from todi_offline.losses import DistillationConfig, dense_divergence, distillation_loss
from todi_offline.losses.schedule import scheduled
from todi_offline.models.head import head_of
from todi_offline.targets.sparse import SparseTargets
from todi_offline.training.stream import Collator, batch_targets

NUM_BINS = 15

Batch = dict[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]
"""Student logits at the targets of a batch -> the mean loss over them."""
TeacherLogits = Callable[[Batch], Tensor]
"""A batch -> the teacher's logits at its targets."""


def losses_of(
    student: Any, sequences: Any, drawn: Iterable[Sequence[int]], loss: Loss, vocab_size: int, dtype: Any = None
) -> Iterator[Tensor]:
    """Yield the loss of each drawn batch of sequence numbers; `dtype` is autocast's, none for float32."""
    collate = Collator()
    for indices in drawn:
        batch = on_device(collate([sequences[index] for index in indices]), student)
        with torch.autocast(batch["labels"].device.type, dtype, enabled=dtype is not None):
            logits = logits_of(student, batch, vocab_size)
        yield loss(logits.float(), batch)


def logits_of(model: Any, batch: Batch, vocab_size: int) -> Tensor:
    """Return a model's logits at the targets of a batch."""
    with head_of(model).at(batch["target_positions"]):
        output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    logits: Tensor = output.logits[0, :, :vocab_size]
    return logits


def dense_loss(arm: Arm, teacher: TeacherLogits, logits: Tensor, batch: Batch) -> Tensor:
    """Return the loss of an arm that learns from the labels alone, or from all of the teacher's logits too."""
    ce = cross_entropy(logits, batch["labels"])
    if arm.targets == "none":
        return ce
    kd = dense_divergence(logits, teacher(batch), arm.loss, temperature=arm.temperature).mean()
    return (1 - arm.kd_weight) * ce + arm.kd_weight * kd


def cached_loss(
    arm: Arm, cache: Cache, logits: Tensor, batch: Batch, *, progress: Iterator[float] | None = None
) -> Tensor:
    """Return the loss of an arm that learns from a cache.

    `progress` yields how far the run is, from 0 to 1; an arm with a schedule needs it.
    """
    targets = batch_targets(batch, cache)
    if arm.targets == "renormalised":
        targets = renormalised(targets)
    config = objective_of(arm)
    if progress is not None:
        config = scheduled(config, next(progress))
    return distillation_loss(logits, batch["labels"], targets, config)[0]


def objective_of(arm: Arm) -> DistillationConfig:
    """Return the settings of the loss of an arm that learns from a cache."""
    tail: Any = "bucket" if arm.targets == "renormalised" else arm.tail
    texts = dict(setting.split("=") for setting in arm.settings.split())
    others: dict[str, Any] = {name: float(text) if name.endswith("weight") else text for name, text in texts.items()}
    return DistillationConfig(
        divergence=arm.loss,
        temperature=arm.temperature,
        tail=tail,
        tail_weight=arm.tail_weight or None,
        kd_weight=arm.kd_weight,
        **others,
    )


def bytes_per_target(arm: Arm, cache: Cache) -> float:
    """Return the bytes of the arrays that an arm reads of the teacher's predictions."""
    used = {"topk_ids", "topk_logprobs"}
    used |= {"tail_logsumexp"} if arm.tail in ("bucket", "sampled") else set()
    used |= {"tail_ids", "tail_logprobs"} if arm.tail == "sampled" else set()
    return sum(cache.bytes_by_array.get(name, 0) for name in used) / int(cache.num_targets.sum())


def renormalised(targets: SparseTargets) -> SparseTargets:
    """Return targets whose kept ids are renormalised to sum to one."""
    empty = torch.full_like(targets.tail_logsumexp, -torch.inf)
    return dataclasses.replace(targets, logprobs=targets.logprobs.log_softmax(-1), tail_logsumexp=empty)


def random_draws(
    sequences: Iterable[CachedSequence], teacher: TeacherLogits, num_draws: int, seed: int
) -> tuple[list[CachedSequence], float]:
    """Return sequences with ids drawn from the teacher in place of its top k, and their bytes a target."""
    generator = torch.Generator().manual_seed(seed)
    collate, drawn = Collator(), []
    for sequence in sequences:
        logits = teacher(collate([sequence]))
        ids = torch.multinomial(logits.float().softmax(-1).cpu(), num_draws, replacement=True, generator=generator)
        drawn.append(with_ids(sequence, ids.sort(-1).values.numpy().astype(np.uint32)))
    return drawn, bytes_of_draws(np.concatenate([sequence.targets.ids for sequence in drawn]))


def bytes_of_draws(ids: npt.NDArray[np.uint32]) -> float:
    """Return the bytes a target of ids drawn, [target, draw] and sorted, in pcodec: different ids, how often each.

    Ids are stored as their distance from the one before, beside the number of different ids of each target.
    """
    steps = np.diff(ids.astype(np.int64), axis=1, prepend=-1)
    is_new = steps > 0
    starts = np.flatnonzero(is_new)
    columns = (steps[is_new], np.diff(starts, append=is_new.size), is_new.sum(axis=1))
    config = pcodec.ChunkConfig()
    return sum(len(pcodec.standalone.simple_compress(c.astype(np.uint32), config)) for c in columns) / len(ids)


def with_ids(sequence: CachedSequence, ids: npt.NDArray[np.uint32]) -> CachedSequence:
    """Return a sequence whose targets are ids alone, any number of any meaning."""
    nothing = np.zeros(ids.shape, np.float32)
    targets = dataclasses.replace(sequence.targets, ids=ids, logprobs=nothing, tail_ids=None, tail_logprobs=None)
    return dataclasses.replace(sequence, targets=targets)


def random_draws_loss(arm: Arm, logits: Tensor, batch: Batch) -> Tensor:
    """Return the loss of an arm whose teacher is the drawn ids, each as likely as its share of the draws."""
    logprobs = logits.float().log_softmax(-1)
    ce = -logprobs.gather(-1, batch["labels"][:, None]).mean()
    kd = -logprobs.gather(-1, batch["ids"].long()).mean()
    return (1 - arm.kd_weight) * ce + arm.kd_weight * kd


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the mean over positions of |mean confidence - share right| of the bin that a position falls into."""
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, device=confidence.device).index_add(0, bins, confidence - right)
    return (gaps.abs().sum() / len(right)).item()


def on_device(batch: Batch, model: Any) -> Batch:
    """Return a batch on the device of a model."""
    device = model.get_input_embeddings().weight.device
    return {name: values.to(device) for name, values in batch.items()}
