"""A student and a held-out cache in, the student's distance to the cached teacher out; no teacher is present.

What is measured, as means over targets. p is the teacher, q the student; KLs are at the chosen temperature, all else
is at temperature 1; everything in nats.

    forward_kl, reverse_kl   KL(p || q) and KL(q || p) with all ids that are not kept as one entry: lower bounds of the
                             dense ones. `ToDiTrainer` logs the same.
    forward_kl_full          where tail samples are stored: an unbiased estimate of the dense KL(p || q), by the chain
                             rule; see `todi_offline.losses.sparse_divergence`. Its standard error includes the
                             samples' chance, which at the temperature that they were drawn at is small beside that of
                             the text, and at another may not be
    top1_agreement           share of targets whose most probable id is the teacher's
    top1_accuracy            share of targets whose most probable id is the label
    cross_entropy            of the labels; perplexity is its exponential; teacher_cross_entropy is the teacher's own
    confidence               the student's largest probability
    teacher_confidence       the teacher's probability of that same id; 0 where it did not keep it
    calibration_error        expected calibration error (Guo et al. 2017, arXiv 1706.04599): over 15 bins of equal
                             width of the confidence, the mean, weighted by the targets in each, of
                             |mean confidence - mean top1_accuracy|
    calibration_error_to_teacher
                             the same with teacher_confidence in place of top1_accuracy: 0 for a student equal to its
                             teacher

There is no estimate of the dense reverse KL: it needs log p where the student has mass, and the samples lie where the
teacher has. Weighting them by q/p is unbiased, with a variance that has no useful bound. Measured on 1,409 targets of
a real teacher (V = 49,152, K = 64, 8 samples, T = 1) and a student at a dense reverse KL of 6.67: 5.13, standard error
0.23; with K = 32 5.49 and 0.38; self-normalised weights gave 3.39, less than the bucket's lower bound of 3.73.
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
from todi_offline.errors import TargetsError
from todi_offline.evaluation.tally import Group, Tally
from todi_offline.head import Head, require_vocabulary, tried_head
from todi_offline.losses import DistillationConfig
from todi_offline.losses.divergences import forward_kl, reverse_kl
from todi_offline.losses.entries import entry_divergence, student_entries, teacher_entries
from todi_offline.models import Model, Tokenizer, evaluation_mode
from todi_offline.stream import Collator, batch_targets, prefetch
from todi_offline.targets import SparseTargets

Progress = Callable[[int, int], None]

POSITION_EDGES = (1, 4, 16, 64, 256)
"""Bounds of the groups by position within the response, whose first token is 0."""

ENTROPY_EDGES = (0.5, 1.0, 2.0, 3.0)
"""Bounds of the groups by the teacher's entropy in nats, at the chosen temperature. What is stored gives a lower bound
of it, which stands for it here: -sum of p log p over the stored entries, and - p_tail log m over the tail, each of
whose ids has at most m, the least of p_tail and the least stored p. The samples have no part in it: a group chosen by
them would be one of high or low estimates."""

CHUNK_BYTES = 64 * 2**20
"""Logits in float32 that exist at a time."""

SORTED_BATCHES = 32
"""Batches whose sequences are sorted by length together: little padding, and shards are read one after the other."""


@dataclass(frozen=True, slots=True)
class Distance:
    """A student's distance to a cached teacher; groups without a target are left out."""

    num_sequences: int
    temperature: float
    k: int
    """Entries kept in the lower bounds."""
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
    """Measure a student against the teacher of a cache, over its first `limit` sequences.

    `k` keeps fewer entries than are stored; it concerns the lower bounds alone. The head runs at the targets only, and
    memory does not grow with the cache but for an index.

    Raises:
        ModelError: the student's head lacks ids that the cache holds.
        CacheMismatchError: the tokenizer is not the one whose ids the cache holds.
        TargetsError: the temperature was not captured, k is out of range, or the cache holds samples alone.
    """
    if not cache.manifest.settings.k or k == 0:
        raise TargetsError(
            f"without kept ids ({cache.root}, k = 0) the teacher's most probable id is unknown; evaluate on a held-out "
            "cache that was captured with k of 1 or more, and with k of 1 or more"
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
    """Count the targets of each response from 0, given the positions that `Collator` makes of unpacked sequences.

    Responses are runs: a turn ends before the next prompt, and a row's last token is no target.
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
    """Return the measures of each target, and `teacher_entropy` as `ENTROPY_EDGES` says."""
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
    """Return the measures of a batch's targets, and the teacher's entropy at each."""
    device, vocab = head.model.get_input_embeddings().weight.device, cache.manifest.vocab_size
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = batch_targets(batch, cache)
    parts: list[dict[str, Tensor]] = []
    start, rows = 0, max(1, CHUNK_BYTES // (4 * vocab))
    for logits in head.chunks(batch["target_positions"], rows, input_ids=batch["input_ids"]):
        some = slice(start, start + len(logits))
        parts.append(measure_targets(logits[:, :vocab], batch["labels"][some], targets[some], temperature, k))
        start = some.stop
    measures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    measures["teacher_cross_entropy"] = -batch["label_logprob"]
    values = {name: value.cpu().numpy().astype(np.float64) for name, value in measures.items()}
    return values, values.pop("teacher_entropy")
