"""Chunks of a teacher's logits in, rows of targets as a cache stores them out, for every engine."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline import tuning
from todi_offline.cache.format.keys import content_key
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example
from todi_offline.errors import TeacherOutputError
from todi_offline.targets.host_copy import HostCopy, queued_to
from todi_offline.targets.sparse import SparseTargets, require_softmax, teacher_targets

MIN_ROWS = 16
"""Products of the head have a multiple of this many rows: with fewer, a kernel sums in another order."""


def chunk_rows(vocab_size: int, device: torch.device | None = None) -> int:
    """Return how many rows of logits over a vocabulary of that size are made at a time on a device.

    Without one, as on a CPU: for a device whose memory something else has taken.
    """
    on_cpu = tuning.CPU_TARGET_BYTES  # in float32: the largest tensor that the head makes
    num_bytes = on_cpu if device is None else tuning.chunk_bytes(device, on_cpu)
    return max(1, num_bytes // (4 * vocab_size) // MIN_ROWS) * MIN_ROWS


def filled_up(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Concatenate rows, and repeat the last one up to a multiple of `MIN_ROWS`."""
    rows = np.concatenate(parts)
    return np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % MIN_ROWS, axis=0)])


def tail_uniforms(example: Example, settings: CacheSettings) -> npt.NDArray[np.float64]:
    """Return the uniform numbers [target, sample] that decide the tail samples of an example.

    They depend on its content and the seed alone: not on the batch, the shard or the worker. Stratified: each of S
    equal parts of [0, 1) holds one of a row's S numbers, in random order. So every number by itself, and any choice of
    columns, is uniform: a mean over the samples, or over the first few of them, has the expectation that it has with
    independent draws, and at most its variance, however the tail's ids are ordered.
    """
    key = content_key(example.token_ids, example.target_mask) + settings.tail_seed.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    shape = (int(example.target_mask.sum()), settings.tail_samples)
    strata = generator.permuted(np.broadcast_to(np.arange(settings.tail_samples), shape), axis=1)
    uniforms = (strata + generator.random(shape)) / max(settings.tail_samples, 1)
    return np.minimum(uniforms, np.nextafter(1.0, 0.0))  # the last stratum's may round to 1


@dataclass(frozen=True, slots=True)
class QueuedRows:
    """Targets of chunks of logits, which a device may still be computing; their copies to the host are queued."""

    chunks: tuple[HostCopy, ...]
    temperatures: tuple[float, ...]
    tail_temperature: float

    def read(self) -> TargetRows:
        """Wait for the last chunk, and return the rows.

        Raises:
            TeacherOutputError: a logit is NaN or +inf; `row` counts over all chunks.
        """
        copies = [chunk.read() for chunk in self.chunks]
        require_softmax(torch.cat([copy["largest"] for copy in copies]))
        return TargetRows.concatenate([self._rows(copy) for copy in copies])

    def _rows(self, copies: Mapping[str, Tensor]) -> TargetRows:
        arrays: dict[str, Any] = {
            name: tensor.numpy().astype("<u4" if name.endswith("ids") else "<f4")
            for name, tensor in copies.items()
            if name != "largest"
        }
        return TargetRows(temperatures=self.temperatures, tail_temperature=self.tail_temperature, **arrays)


def queue_chunks(
    chunks: Iterable[Float[Tensor, "chunk vocab"]],
    labels: Int[Tensor, " target"],
    uniforms: Float[Tensor, "target sample"],
    settings: CacheSettings,
) -> QueuedRows:
    """Queue the computation of the targets of chunks of logits, which are made one after the other, and their copies.

    On a CUDA device the host waits for nothing here. It goes on while the device computes, and a chunk's logits are
    freed in the order of the device's work, so that no more of them exist at a time than if the host waited.
    """
    copies, start = [], 0
    for logits in chunks:
        rows = slice(start, start + len(logits))
        targets, label_logprob, largest = teacher_targets(
            logits,
            queued_to(labels[rows], logits.device),
            settings.k,
            settings.temperatures,
            uniforms[rows] if settings.tail_samples else None,
            settings.tail_temperature,
        )
        log_partition = _log_partition(logits, targets) if settings.encoding == "bf16_logit" else None
        copies.append(
            HostCopy.start(
                {
                    "largest": largest,
                    "ids": targets.ids,
                    "logprobs": targets.logprobs,
                    "tail_logsumexp": targets.tail_logsumexp,
                    "label_logprob": label_logprob,
                    "tail_ids": targets.tail_ids,
                    "tail_logprobs": targets.tail_logprobs,
                    "log_partition": log_partition,
                }
            )
        )
        start = rows.stop
    return QueuedRows(tuple(copies), settings.temperatures, settings.tail_temperature)


def sparsify_chunks(
    chunks: Iterable[Float[Tensor, "chunk vocab"]],
    labels: Int[Tensor, " target"],
    uniforms: Float[Tensor, "target sample"],
    settings: CacheSettings,
) -> TargetRows:
    """Return the targets of chunks of logits: those of `queue_chunks`, read at once.

    Raises:
        TeacherOutputError: a logit is NaN or +inf; `row` counts over all chunks.
    """
    return queue_chunks(chunks, labels, uniforms, settings).read()


def _log_partition(logits: Float[Tensor, "target vocab"], targets: SparseTargets) -> Float[Tensor, " target"]:
    """Return the log sum of exp(logit): a logit less its log-prob, of the first kept id or of the first sample."""
    ids, logprobs = targets.ids, targets.logprobs
    if not ids.shape[1]:
        assert targets.tail_ids is not None
        assert targets.tail_logprobs is not None
        ids, logprobs = targets.tail_ids, targets.tail_logprobs
    return logits.gather(-1, ids[:, :1]).squeeze(-1) - logprobs[:, 0]


def located(error: TeacherOutputError, sources: Sequence[tuple[str, npt.NDArray[np.int64]]]) -> TeacherOutputError:
    """Return the error with the example and position of its row; `sources` has each example's id and positions."""
    row = error.row
    for example_id, positions in sources:
        if row < len(positions):
            return TeacherOutputError(
                f"the teacher's logits for example {example_id!r} at position {positions[row]} hold NaN or +inf; "
                "nothing of this shard is committed. Try --dtype float32 or bfloat16, or take the example out of the "
                "data",
                error.row,
            )
        row -= len(positions)
    return error
