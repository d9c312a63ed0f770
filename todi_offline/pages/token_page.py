"""Sequences with a student's predictions in, their section of a page out: ToDi's gate at work."""

from collections.abc import Mapping, Sequence

import numpy as np

from todi_offline.pages.blocks import facts, numbers
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
    """Return the section of sequences with a student's predictions, the largest KL first.

    `names` are the facts that the page lists first, such as "Student" and "Cache".
    """
    shown = sorted(shown, key=lambda item: -_mean_kl(item, temperature, beta))
    block = token_block(shown, texts, temperature=temperature, beta=beta)
    means = [(measure["label"], float(block[measure["name"]].mean(dtype=np.float64))) for measure in block["measures"]]
    num_targets = sum(len(item.sequence.targets) for item in shown)
    rows = [*names.items(), ("Means", f"over {num_targets:,} targets, at temperature {temperature:g}")]
    note = (
        f"ToDi's gate is a = sigmoid({beta:g} · log(p / q)), p the teacher's probability of a token and q the "
        "student's. Where a is above 0.5 (blue), the student gives the token too little, and ToDi pulls it up, as "
        "forward KL does. Where a is below 0.5 (orange), the student gives it too much, and ToDi pushes it down, as "
        f"reverse KL does. Shown are {len(shown):,} of {num_sequences:,} sequences, the largest KL first."
    )
    listed = numbers([(label, f"{mean:.4f}") for label, mean in means])
    return Section("Tokens", note, [facts(rows), listed, block])


def _mean_kl(item: ShownSequence, temperature: float, beta: float) -> float:
    assert item.student is not None, "the student has read it"
    kept, tail, _ = teacher_entries(item.sequence.targets, temperature)
    student = np.column_stack([item.student.kept, item.student.tail])
    return float(divide(np.column_stack([kept, tail]), student, beta).forward_kl.mean())
