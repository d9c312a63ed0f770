"""What is to be captured in; the shapes and encodings that its cache could have, each with its bytes, out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.planning import CapturePlan
from todi_offline.capturing.config import CaptureConfig
from todi_offline.costing.probing import Probe, draw, with_shape
from todi_offline.costing.results import Choice
from todi_offline.costing.storage import Amount, StoredBytes, kept_mass, measured_bytes, narrowed, token_bytes
from todi_offline.costing.studied import BYTES, ENCODINGS, REQUIRED_SHARE, SHAPES, shares_of
from todi_offline.data import Examples

_TOKEN_SAMPLE = 512
"""Sequences whose tokens are stored to see what tokens take, where no teacher ran."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be captured, and what was measured of it."""

    config: CaptureConfig
    vocab_size: int
    examples: Examples
    plan: CapturePlan
    amount: Amount
    unread: npt.NDArray[np.int64]
    """Numbers of the sequences that the teacher has yet to read."""
    probe: Probe | None
    setup_seconds: float
    """To load the teacher and to take its fingerprint."""


def shapes_of(vocab_size: int, asked: CacheSettings) -> list[tuple[int, int]]:
    """Return the shapes of the table that a probe can have beside the settings that are asked for.

    A probe that keeps the whole vocabulary has no tail, so it has no samples.
    """
    is_dense = asked.k >= vocab_size
    return [(k, samples) for k, samples in SHAPES if k < vocab_size and not (samples and is_dense)]


def choices_of(work: Work) -> list[Choice]:
    """Return the rows of the table: what is asked for, and the shapes that were studied."""
    asked = work.config.cache
    wanted = (asked.k, asked.tail_samples, asked.encoding)
    rows = [(*shape, encoding) for shape in shapes_of(work.vocab_size, asked) for encoding in ENCODINGS]
    if not work.amount.num_sequences:
        return []
    return [_choice(work, *row, is_asked=row == wanted) for row in sorted({*rows, wanted})]


def _choice(work: Work, k: int, samples: int, encoding: str, *, is_asked: bool) -> Choice:
    shape: dict[str, Any] = {"encoding": encoding}
    settings = dataclasses.replace(with_shape(work.config.cache, k, samples), **shape)
    mass, basis, stored = None, "unknown", None
    if work.probe is not None:
        rows = work.probe.asked if is_asked else narrowed(work.probe.sequences, settings)
        mass, basis, stored = kept_mass(rows), "probe", measured_bytes(rows, settings, work.vocab_size, work.amount)
    elif (found := BYTES.get((k, samples, encoding))) is not None:
        basis, stored = "study", _studied_bytes(work, settings, found)
    total = None if stored is None else round(stored.total(work.amount))
    return Choice(
        k,
        samples,
        encoding,
        None if total is None else total / work.amount.num_targets,
        total,
        mass,
        basis,  # type: ignore[arg-type]
        shares_of(k, samples),
        is_asked,
    )


def _studied_bytes(work: Work, settings: CacheSettings, per_target: float) -> StoredBytes:
    """Return the study's bytes a target, with what the tokens themselves take."""
    chosen = draw(work.plan.sequences, _TOKEN_SAMPLE, 0)
    some = [work.examples[int(index)] for index in chosen]
    tokens = token_bytes([(each.token_ids, each.target_mask) for each in some], settings, work.vocab_size, work.amount)
    return dataclasses.replace(tokens, per_target=per_target)


def suggested(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Mark the choice with the fewest bytes of those that come near dense ToDi in every study."""
    near = [
        choice
        for choice in choices
        if choice.total_bytes is not None and (choice.shares.worst or 0.0) >= REQUIRED_SHARE
    ]
    best = min(near, key=lambda choice: choice.total_bytes or 0, default=None)
    return tuple(dataclasses.replace(choice, is_suggested=choice is best) for choice in choices)


def reason(choices: Sequence[Choice]) -> str:
    """Return the suggestion in words."""
    best = next((choice for choice in choices if choice.is_suggested), None)
    if best is None:
        return "none: the studies measured none of these shapes"
    options = f"--k {best.k} --tail-samples {best.tail_samples} --encoding {best.encoding}"
    why = (
        f"the fewest bytes of the shapes with at least {REQUIRED_SHARE:.0%} of dense ToDi's gain in forward KL in "
        f"every study (its smallest share is {best.shares.worst:.0%})"
    )
    asked = next((choice.total_bytes for choice in choices if choice.is_asked), None)
    if best.is_asked or not asked or not best.total_bytes:
        return f"{options}: {why}"
    return f"{options}: {why}, in {best.total_bytes / asked:.2f} times the bytes of your settings"
