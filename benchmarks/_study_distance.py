"""A student and its teacher's kept logits in; their distance on held-out text, with standard errors, out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._study_kept import KeptTeacher, numbered
from benchmarks._study_losses import NUM_BINS, Batch, logits_of
from todi_offline.cache.reader import Cache
from todi_offline.losses.divergences import forward_kl
from todi_offline.models.loading import evaluation_mode
from todi_offline.training.stream import Collator


@torch.no_grad()
def distance(student: Any, cache: Cache, teacher: KeptTeacher) -> dict[str, float]:
    """Compare a student with its teacher over the whole vocabulary, and return measures and their standard errors."""
    collate = Collator(pack=False)
    sequences = sorted(numbered(cache), key=lambda sequence: len(sequence.token_ids))  # so that little is padded
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(sequences), 4):
        batch = collate(sequences[start : start + 4])
        with evaluation_mode(student):
            logits = logits_of(student, batch, cache.manifest.vocab_size)
        rows = batch["target_positions"] // batch["input_ids"].shape[1]
        for name, values in (_measures(logits, batch, teacher) | {"sequence": start + rows}).items():
            parts.setdefault(name, []).append(values.double())
    measured = {name: torch.cat(part).numpy() for name, part in parts.items()}
    return estimates(measured, measured.pop("sequence").astype(int))


def _measures(logits: Tensor, batch: Batch, teacher: KeptTeacher) -> dict[str, Tensor]:
    p, q = teacher.logits(batch).log_softmax(-1), logits.log_softmax(-1)
    best = q.max(-1)
    return {
        "forward_kl": forward_kl(p, q),
        "reverse_kl": forward_kl(q, p),
        "top1_agreement": (best.indices == p.argmax(-1)).float(),
        "cross_entropy": -q.gather(-1, batch["labels"][:, None]).squeeze(-1),
        "confidence": best.values.exp(),
        "right": (best.indices == batch["labels"]).float(),
    }


def estimates(values: dict[str, Any], sequences: Any, num_resamples: int = 200) -> dict[str, float]:
    """Return the means over targets, the calibration error, and the bootstrap standard errors of all."""
    confidence, right = values.pop("confidence"), values.pop("right")
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    num_sequences = int(sequences.max()) + 1
    sums = np.zeros((num_sequences, len(values) + 1 + NUM_BINS))
    columns = np.stack([*values.values(), np.ones(len(bins))], axis=1)
    np.add.at(sums[:, : columns.shape[1]], sequences, columns)
    np.add.at(sums, (sequences, columns.shape[1] + bins), confidence - right)

    def means(sums: Any) -> Any:
        num_targets = sums[..., len(values), None]
        gaps = np.abs(sums[..., len(values) + 1 :]).sum(-1, keepdims=True)
        return np.concatenate([sums[..., : len(values)], gaps], axis=-1) / num_targets

    drawn = np.random.default_rng(0).multinomial(num_sequences, [1 / num_sequences] * num_sequences, num_resamples)
    errors = means(drawn @ sums).std(axis=0)
    found: dict[str, float] = {}
    for name, mean, error in zip((*values, "calibration_error"), means(sums.sum(0)), errors, strict=True):
        found |= {name: round(float(mean), 5), f"{name}_se": round(float(error), 5)}
    return found
