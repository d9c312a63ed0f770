"""A model as a run holds it in; what a few tokens show of it out: its head, and the collator of its batches.

The passes are made under the run's own autocast and on its device, for a kernel may refuse float32, or a CPU. They are
made on the first rank, which decides for all. No error of theirs is swallowed, but for a model's word that it takes no
such argument or keeps no packed sequences apart.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from todi_offline.models.head import Head, logits_difference, tried_head
from todi_offline.models.loading import Model, evaluation_mode
from todi_offline.training.first_rank import of_first_rank
from todi_offline.training.stream import Collator, model_inputs

logger = logging.getLogger(__name__)

_FIRST, _SECOND = [1, 2, 3, 4, 5], [5, 4, 3]  # token ids of two sequences


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found of a model."""

    head: Head
    collator: Collator


def probe(model: Model, accelerator: Any) -> Findings:
    """Return what is found of a student, the same on every rank; log lines say what is not as fast as it might be."""
    flash = uses_flash(model)
    with accelerator.autocast(), _attention_that_runs(model, accelerator.device):
        found = of_first_rank(lambda: _portable(model, flash=flash), together=_is_spread(model))
    return dataclasses.replace(found, head=dataclasses.replace(found.head, model=model))


def choose_collator(model: Model, *, flash: bool) -> Collator:
    """Return a collator that packs sequences, where the model keeps them apart, with all that its attention wants.

    `flash` says that it is flash attention in the run, whatever it is now.
    """
    name = type(model).__name__
    for collator in [Collator(one_row=True, bounds=True), Collator(one_row=True)] if flash else [Collator()]:
        try:
            difference = packing_difference(model, collator)
        except TypeError as error:
            if (argument := _unexpected_argument(error)) is None:
                raise
            if argument == "position_ids":
                logger.info("%s takes no position_ids, so sequences are not packed", name)
                return Collator(pack=False, positions=False)
            logger.info("%s takes no %s, so each of its layers looks for the bounds of sequences", name, argument)
            continue
        except ValueError as error:
            if "packed sequences" not in str(error):  # as transformers refuses them where a kernel is missing
                raise
            difference = str(error)
        if difference is None:
            return collator
        logger.info("%s does not isolate packed sequences (%s), so sequences are not packed", name, difference)
        break
    return Collator(pack=False)


def uses_flash(model: Model) -> bool:
    """Whether the attention of a model is a kernel of flash attention, which wants all sequences in a single row."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def packing_difference(model: Model, collator: Collator) -> str | None:
    """Return how the logits of a sequence differ where it shares a row with another, None where they do not."""
    device = model.get_input_embeddings().weight.device
    second = torch.tensor([_SECOND], device=device)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([_FIRST + _SECOND], device=device),
        "position_ids": torch.tensor([[*range(len(_FIRST)), *range(len(_SECOND))]], device=device),
    }
    if collator.bounds:
        ends = torch.tensor([0, len(_FIRST), len(_FIRST) + len(_SECOND)], dtype=torch.int32, device=device)
        batch |= {"bounds": ends, "longest": max(len(_FIRST), len(_SECOND))}
    with evaluation_mode(model):
        together = model(**model_inputs(batch), use_cache=False).logits
        alone = model(input_ids=second, use_cache=False).logits
    return logits_difference(together[:, len(_FIRST) :], alone)


def _portable(model: Model, *, flash: bool) -> Findings:
    head = dataclasses.replace(tried_head(model, linear=True), model=None)
    return Findings(head, choose_collator(model, flash=flash))


def _is_spread(model: Model) -> bool:
    """Whether no rank has all of the weights, so that no rank can make a pass by itself."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextlib.contextmanager
def _attention_that_runs(model: Model, device: torch.device) -> Iterator[None]:
    """Within, a model that waits on the CPU for its place on a device uses an attention that a CPU has."""
    name, here = getattr(model.config, "_attn_implementation", None), next(model.parameters()).device
    if here.type == device.type or not uses_flash(model):
        yield
        return
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = name


def _unexpected_argument(error: TypeError) -> str | None:
    found = re.search(r"unexpected keyword argument '(position_ids|cu_seq_lens_q)'", str(error))
    return found and found[1]
