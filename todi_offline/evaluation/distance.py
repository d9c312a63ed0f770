"""A student and a held-out cache come in; the student's distance to the cached teacher goes out. No teacher is loaded.

All measures are means over targets, in nats. p is the teacher and q the student. The KLs are at the chosen temperature,
all other measures at temperature 1.

    forward_kl, reverse_kl   KL(p || q) and KL(q || p) with all ids outside the top k as one entry: lower bounds of the
                             dense KLs. `ToDiTrainer` logs the same measures.
    forward_kl_full          an unbiased estimate of the dense KL(p || q) by the chain rule, if the cache has tail
                             samples; see `todi_offline.losses.sparse_divergence`. Its standard error includes the
                             sampling noise. At the temperature of the samples this noise is small beside the noise of
                             the text; at other temperatures it may not be.
    top1_agreement           share of targets at which student and teacher have the same most probable id
    top1_accuracy            share of targets at which the student's most probable id is the label
    cross_entropy            cross-entropy of the labels; perplexity is its exponential, teacher_cross_entropy the
                             teacher's own
    confidence               the student's largest probability
    teacher_confidence       the teacher's probability of the same id; 0 if the cache does not hold it
    calibration_error        expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean over 15 bins of
                             confidence, of equal width and weighted by their targets, of
                             |mean confidence - mean top1_accuracy|
    calibration_error_to_teacher
                             the same with teacher_confidence instead of top1_accuracy: 0 for a student equal to its
                             teacher

There is no estimate of the dense reverse KL. It needs log p where the student has mass, and the samples lie where the
teacher has mass. Weights q/p make the estimate unbiased, but its variance has no useful bound. Measured on 1,409
targets of a real teacher (V = 49,152, K = 64, 8 samples, T = 1) and a student at a dense reverse KL of 6.67: the
estimate was 5.13 with standard error 0.23; with K = 32, 5.49 and 0.38. Self-normalised weights gave 3.39, less than the
bucket's lower bound of 3.73.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache
from todi_offline.errors import ModelError, TargetsError
from todi_offline.evaluation.tally import Group, Tally
from todi_offline.losses import DistillationConfig
from todi_offline.losses.divergences import forward_kl, reverse_kl
from todi_offline.losses.entries import entry_divergence, student_entries, teacher_entries
from todi_offline.models.head import Head, require_vocabulary, tried_head
from todi_offline.models.loading import Model, Tokenizer, evaluation_mode
from todi_offline.targets.rows import chunk_rows
from todi_offline.targets.sparse import SparseTargets
from todi_offline.training.stream import Collator, batch_targets, prefetch

Progress = Callable[[int, int], None]

POSITION_EDGES = (1, 4, 16, 64, 256)
"""Bounds of the groups by position in the response; its first token has position 0."""

ENTROPY_EDGES = (0.5, 1.0, 2.0, 3.0)
"""Bounds of the groups by the teacher's entropy in nats, at the chosen temperature. The groups use a lower bound of the
entropy that needs only the stored entries: -sum of p log p over them, and -p_tail log m for the tail, where m, the
smaller of p_tail and the smallest stored p, bounds the probability of each tail id. Tail samples are not used: groups
chosen by samples would select high or low estimates."""

SORTED_BATCHES = 32
"""Number of batches whose sequences are sorted by length together: little padding, and each shard is read once."""


@dataclass(frozen=True, slots=True)
class Distance:
    """A student's distance to a cached teacher; groups without targets are left out."""

    num_sequences: int
    temperature: float
    k: int
    """Entries of the top k used in the lower bounds."""
    overall: Group
    by_position: list[Group]
    by_teacher_entropy: list[Group]


def evaluate_cache(
    model: Model,
    tokenizer: Tokenizer,
    cache: Cache,
    *,
    temperature: float = 1.0,
    k: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Distance:
    """Measure a student against the teacher of a cache, over the cache's first `limit` sequences.

    `k` uses fewer entries than the cache stores, and only in the lower bounds. The head runs only at the targets, and
    only an index of the cache is kept in memory.

    Raises:
        ModelError: the student's head lacks ids that the cache holds, or its logits are NaN.
        CacheMismatchError: the tokenizer differs from the cache's.
        TargetsError: the cache was not captured at the temperature or holds samples alone, or k is out of range.
    """
    if not cache.manifest.settings.k or k == 0:
        raise TargetsError(
            f"{cache.root} is used with k = 0, so the teacher's most probable id is unknown; evaluate on a held-out "
            "cache that was captured with k of 1 or more, and leave out k"
        )
    require_vocabulary(model, cache.manifest.vocab_size)
    require_same_tokenizer(tokenizer_fingerprint(tokenizer), cache.manifest, "the student")
    total = len(cache) if limit is None else min(limit, len(cache))
    batches = prefetch(_batches(cache, total, batch_size))
    num_sequences = 0
    tally: Tally | None = None
    head = tried_head(model)
    with evaluation_mode(model):
        for batch in batches:
            measures, entropy = _measure_batch(head, batch, cache, temperature, k)
            tally = tally or Tally(list(measures), ((), POSITION_EDGES, ENTROPY_EDGES))
            positions = batch["target_positions"].numpy()
            sequences = positions // batch["input_ids"].shape[1]
            tally.add(sequences, (positions, position_in_response(positions), entropy), measures)
            num_sequences += len(batch["input_ids"])
            if progress:
                progress(num_sequences, total)
    assert tally is not None  # a cache has sequences
    (overall,), by_position, by_teacher_entropy = tally.groups()
    kept = cache.manifest.settings.k if k is None else k
    return Distance(num_sequences, temperature, kept, overall, by_position, by_teacher_entropy)


def position_in_response(target_positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the position of each target in its response, from 0; the input is `Collator`'s for unpacked sequences.

    A response is a run of adjacent targets: prompts separate turns, and the last token of a row is never a target.
    """
    index = np.arange(len(target_positions))
    starts = np.diff(target_positions, prepend=-2) != 1
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def measure_targets(
    logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    targets: SparseTargets,
    temperature: float,
    k: int | None,
) -> dict[str, Float[Tensor, " target"]]:
    """Return the measures of each target, and `teacher_entropy` as `ENTROPY_EDGES` defines it."""
    logits = logits.float()
    teacher = teacher_entries(targets, temperature)
    student, _ = student_entries(logits, targets, temperature)
    width = teacher.kept.shape[1] if k is None else k
    p, q = teacher.narrow(width).with_bucket(), student.narrow(width).with_bucket()
    measures = {"forward_kl": forward_kl(p, q), "reverse_kl": reverse_kl(p, q)}
    if targets.tail_ids is not None:
        full = DistillationConfig(divergence="forward_kl", temperature=temperature, tail="sampled", tail_weight=1.0)
        measures["forward_kl_full"] = entry_divergence(teacher, student, full)
    log_partition = logits.logsumexp(-1)
    largest, top = logits.max(-1)
    is_top = targets.ids == top[:, None]
    likeliest_in_tail = torch.minimum(teacher.kept[:, -1], teacher.tail)
    return measures | {
        "top1_agreement": is_top[:, 0].float(),
        "top1_accuracy": (top == labels).float(),
        "cross_entropy": log_partition - logits.gather(-1, labels[:, None]).squeeze(-1),
        "confidence": (largest - log_partition).exp(),
        "teacher_confidence": (targets.logprobs.exp() * is_top).sum(-1),
        "teacher_entropy": -(teacher.kept.exp() * teacher.kept).sum(-1) - teacher.tail.exp() * likeliest_in_tail,
    }


def _batches(cache: Cache, total: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    collate = Collator(pack=False)
    window = SORTED_BATCHES * batch_size
    for first in range(0, total, window):
        numbers = sorted(range(first, min(first + window, total)), key=lambda number: -cache.num_tokens[number])
        for start in range(0, len(numbers), batch_size):
            yield collate([cache[number] for number in numbers[start : start + batch_size]])


def _measure_batch(
    head: Head, batch: dict[str, Tensor], cache: Cache, temperature: float, k: int | None
) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Return the measures of a batch's targets, and the teacher's entropy at each target."""
    device, vocab = head.model.get_input_embeddings().weight.device, cache.manifest.vocab_size
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = batch_targets(batch, cache)
    parts: list[dict[str, Tensor]] = []
    start, rows = 0, chunk_rows(vocab, head.device)
    for logits in head.chunks(batch["target_positions"], rows, input_ids=batch["input_ids"]):
        chunk = slice(start, start + len(logits))
        parts.append(measure_targets(logits[:, :vocab], batch["labels"][chunk], targets[chunk], temperature, k))
        start = chunk.stop
    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    measures["teacher_cross_entropy"] = -batch["label_logprob"]
    values = {name: value.cpu().numpy().astype(np.float64) for name, value in measures.items()}
    if num_nan := int(np.isnan(values["confidence"]).sum()):
        raise ModelError(
            f"the student's logits are NaN at {num_nan} of {len(values['confidence'])} targets of a batch; load it in "
            "float32 (--dtype float32), or evaluate an earlier checkpoint"
        )
    return values, values.pop("teacher_entropy")
