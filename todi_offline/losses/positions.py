"""Scores of the student by position in, the weight of each position in KD out: which positions are distilled.

Cross-entropy is taken at every position. KD is taken at the selected positions alone and divided by their number, as
equation 4 of SE-KD does for one sequence. The selection is made among the rows of one call, those of a micro-batch; the
paper makes it within each sequence.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.errors import ConfigError

Rule = Literal["student-entropy", "tip"]


@dataclass(frozen=True, slots=True)
class Selection:
    """A rule that selects positions, and the share of them that it selects.

    Attributes:
        rule: "student-entropy" selects where the student is least sure (SE-KD, Tavor et al. 2026, arXiv 2602.01395).
            "tip" selects where the student is unsure, or sure and far from the teacher (TIP, Xu et al. 2026, arXiv
            2604.14084); see `scores`.
        share: above 0, 1 at most.
    """

    rule: Rule
    share: float


def parse_selection(text: str) -> Selection | None:
    """Return the selection that `rule:share` names, None for `all`.

    Raises:
        ConfigError: the rule is unknown, or the share is out of range.
    """
    if text == "all":
        return None
    rule, _, number = text.partition(":")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if rule not in get_args(Rule) or not 0 < share <= 1:
        raise ConfigError(
            f"positions is {text!r}; expected all, student-entropy:SHARE or tip:SHARE, the share above 0 and at most 1"
        )
    return Selection(rule, share)  # type: ignore[arg-type]


def student_entropy(logits: Float[Tensor, "target vocab"]) -> Float[Tensor, " target"]:
    """Return the entropy of the student at T = 1, in nats, without gradient."""
    logits = logits.detach()
    shifted = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-1e3)  # -inf times its probability, 0, would be NaN
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    return total.log() - exponentials.mul_(shifted).sum(-1) / total


def scores(
    selection: Selection, entropy: Float[Tensor, " target"], reverse_kl: Float[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """Return the score of each position: the higher it is, the sooner the position is selected.

    For "tip" it is h + d - h d, h and d the student's entropy and KL(q || p), each divided by the largest of the rows.
    The abstract of TIP names the two regions, high h, and low h with high d; this union of them in [0, 1] is ours.
    """
    if selection.rule == "student-entropy":
        return entropy
    h, d = (values / values.amax().clamp(min=torch.finfo(values.dtype).tiny) for values in (entropy, reverse_kl))
    return h + d - h * d


def position_weights(
    selection: Selection, entropy: Float[Tensor, " target"], reverse_kl: Float[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """Return the number of rows over the number selected at each selected row, and 0 elsewhere.

    So the mean over rows of weight times KD is the mean of KD over the selected rows, and micro-batches are weighted by
    their rows. The share is rounded up; of rows with equal scores the first are selected.
    """
    num_rows = len(entropy)
    weights = torch.zeros_like(entropy)
    if num_rows:
        num_selected = math.ceil(selection.share * num_rows)
        order = scores(selection, entropy, reverse_kl).argsort(descending=True, stable=True)
        weights[order[:num_selected]] = num_rows / num_selected
    return weights
