"""Sequences that a student has read in, their part of a page out: ToDi's gate at work."""

from collections.abc import Mapping, Sequence

import numpy as np

from todi_offline.pages.blocks import facts
from todi_offline.pages.gate import divide, teacher_entries
from todi_offline.pages.page import Section
from todi_offline.pages.texts import TokenTexts
from todi_offline.pages.tokens import ShownSequence, token_block


def token_section(
    shown: Sequence[ShownSequence],
    texts: TokenTexts,
    *,
    names: Mapping[str, str],
    num_sequences: int,
    temperature: float,
    beta: float,
) -> Section:
    """Return the section of sequences that a student has read, those of the largest KL first.

    `names` say whose they are: what the page shows beside "Student" and "Cache".
    """
    shown = sorted(shown, key=lambda item: -_mean_kl(item, temperature, beta))
    block = token_block(shown, texts, temperature=temperature, beta=beta)
    means = [(measure["label"], float(block[measure["name"]].mean(dtype=np.float64))) for measure in block["measures"]]
    rows = [*names.items(), *((f"{label}, mean", f"{mean:.4f}") for label, mean in means)]
    note = (
        f"{len(shown):,} of {num_sequences:,} sequences, at temperature {temperature:g}, the largest KL first. The "
        f"gate a = sigmoid(beta log(p / q)), beta = {beta:g}, weighs each entry's part of forward KL with a and its "
        "part of reverse KL with 1 - a. Above one half the teacher gives the entry more, below one half the student "
        "does. The divergences count all ids that the cache does not keep as one entry."
    )
    return Section("Tokens", note, [facts(rows), block])


def _mean_kl(item: ShownSequence, temperature: float, beta: float) -> float:
    assert item.student is not None, "the student has read it"
    kept, tail, _ = teacher_entries(item.sequence.targets, temperature)
    student = np.column_stack([item.student.kept, item.student.tail])
    return float(divide(np.column_stack([kept, tail]), student, beta).forward_kl.mean())
