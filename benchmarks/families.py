"""Which families of models does this work with, and how?

Tiny random models of the families in `_zoo.py`, with 32 ids of padding in their vocabulary, each:

    capture    targets equal those of plain calls of the model, a sequence at a time; `in chunks`: without holding all
               logits; `whole`: the family changes its logits in an unknown way
    training   loss and gradients of a trainer's batch equal those of plain calls; `fused`: without holding the logits,
               or `from logits`; `packed`: sequences share rows; if they would see each other, each has a row
    pruning    students of the layers 0, 2, 3 and of 0, 1, 3, saved and loaded, are these layers one after another
    width      a student of half the hidden channels, half the heads and five eighths of the MLP, saved and loaded, is
               the family's own modules with 0 for all other weights
    fresh      a new student of half the hidden size and two layers is saved and loaded, and has the teacher's
               embeddings, projected, or copied if their size is not that of the hidden states
    bfloat16   the mean target of a model in bfloat16 equals that of plain calls to 0.05 nats; under autocast the
               trainer's loss equals that from logits to 0.02

A cell that begins with `wrong` is a defect. Not claimed: anything about trained weights, or about kernels for GPUs.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from benchmarks._environment import environment, listed
from benchmarks._zoo import FAMILIES, logits_of_layers, logits_of_parts, tiny_model
from todi_offline import ToDiTrainer, capture, open_cache
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.reader import Cache
from todi_offline.data import Example, Examples
from todi_offline.errors import ModelError
from todi_offline.losses import distillation_loss
from todi_offline.student import Widths, fresh_student, prune_depth
from todi_offline.student.fresh import principal_projection
from todi_offline.student.importance import activation_importance
from todi_offline.student.parts import width_parts
from todi_offline.student.width import most_important, narrow_model, resolve_sizes
from todi_offline.teacher.in_transformers import as_teacher, targets_of

RESULT = Path(__file__).parent / "results" / "families.md"
VOCAB, PADDED = 512, 544
KEPT = ([0, 2, 3], [0, 1, 3])
REMEDIES = r"; (?:choose|cut|make) |\. Its config"
"""What a refusal goes on with."""
SETTINGS = CacheSettings(k=8, tail_samples=4)


def run(quick: bool) -> None:
    logging.getLogger("todi_offline").setLevel(logging.ERROR)  # the table says what the warnings do
    names = list(FAMILIES)[::12] if quick else list(FAMILIES)
    lines = [f"| family | kind | {' | '.join(CHECKS)} |", "|---" * (2 + len(CHECKS)) + "|"]
    lines += [table_row(name, examine(name)) for name in names]
    print("\n".join(lines))
    if not quick:
        RESULT.write_text("\n".join([__doc__ or "", *lines, "", listed(environment()), ""]), encoding="utf-8")


def examine(family: str) -> dict[str, str]:
    """Return the result of each check of a family."""
    return {name: _outcome(check, _padded(family)) for name, check in CHECKS.items()}


def table_row(family: str, found: dict[str, str]) -> str:
    return f"| {family} | {FAMILIES[family][0]} | {' | '.join(found.values())} |"


def _outcome(check: Callable[[Any], str], model: Any) -> str:
    try:
        return check(model)
    except AssertionError as error:
        return f"wrong: {error}"
    except ModelError as error:
        return f"refused: {re.split(REMEDIES, str(error))[0]}"


def captured(model: Any) -> str:
    return _captured(model, 1e-4)


def _captured(model: Any, tolerance: float, worst: Callable[[Tensor], Tensor] = torch.max) -> str:
    teacher = as_teacher(model, _tokenizer())
    for example, rows in zip(_examples(), targets_of(teacher, _examples(), SETTINGS), strict=True):
        with torch.no_grad():
            expected = _plain_logits(model, example).log_softmax(-1)
        found = torch.from_numpy(rows.logprobs)
        _require_close("a top log-prob", found, expected.topk(SETTINGS.k).values, tolerance, worst)
        found = torch.from_numpy(rows.label_logprob)
        labels = expected.gather(-1, _labels(example)[:, None])[:, 0]
        _require_close("a label's log-prob", found, labels, tolerance, worst)
    return "in chunks" if teacher.head.runs_apart else "whole"


def trained(model: Any) -> str:
    trainer, batch = _trainer(model)
    found, expected = trainer.compute_loss(model, batch), _plain_objective(model)
    _require_close("the loss", found, expected, 1e-5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for gradients in zip(*(_gradients(loss, parameters) for loss in (found, expected)), strict=True):
        _require_close("a gradient", gradients[0], gradients[1], 1e-4)
    loss = "fused" if trainer.head.is_linear else "from logits"
    return f"{loss}, {'packed' if trainer.data_collator.pack else 'a row each'}"


def pruned(model: Any) -> str:
    tokens = torch.from_numpy(_examples()[0].token_ids.astype(np.int64))[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for kept in KEPT:
            prune_depth(model, kept).save_pretrained(folder)
            student = AutoModelForCausalLM.from_pretrained(folder)
            found = student(input_ids=tokens, use_cache=False).logits
            _require_close("a logit", found, logits_of_layers(model, kept, tokens), 1e-4)
    return "yes"


def narrowed(model: Any) -> str:
    tokens = torch.from_numpy(_examples()[0].token_ids.astype(np.int64))[None]
    parts = width_parts(model)
    asked = Widths(hidden=parts.sizes.hidden // 2, heads=parts.sizes.heads // 2, mlp=parts.sizes.mlp * 5 // 8)
    sizes = resolve_sizes(asked, parts.sizes)
    kept = most_important(activation_importance(model, parts, tokens), parts.sizes, sizes)
    student = _reloaded(narrow_model(model, parts, sizes, kept))
    with torch.no_grad():
        found = student(input_ids=tokens, use_cache=False).logits
    _require_close("a logit", found, logits_of_parts(model, parts, kept, tokens), 1e-4)
    return "cut"


def made_anew(model: Any) -> str:
    tokens = torch.from_numpy(_examples()[0].token_ids.astype(np.int64))[None]
    old = model.get_input_embeddings().weight
    made = fresh_student(model, Widths(hidden=old.shape[1] // 2), layers=2).eval()
    student = _reloaded(made)
    with torch.no_grad():
        found, expected = (model(input_ids=tokens, use_cache=False).logits for model in (student, made))
    _require_close("a logit", found, expected, 1e-5)
    weight = student.get_input_embeddings().weight
    kept = old if weight.shape == old.shape else principal_projection(old, weight.shape[1])
    assert torch.equal(weight, kept), "the embeddings are others"
    return "yes"


def _reloaded(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)


def in_bfloat16(model: Any) -> str:
    trainer, batch = _trainer(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, (expected, _) = trainer.compute_loss(model, batch), trainer.compute_loss(model, batch, True)
    _require_close("the loss", found, expected, 2e-2)
    _captured(model.bfloat16(), 0.05, torch.mean)  # at single positions rounding may choose other experts
    return "yes"


CHECKS: dict[str, Callable[[Any], str]] = {
    "capture": captured,
    "training": trained,
    "pruning": pruned,
    "width": narrowed,
    "fresh": made_anew,
    "bfloat16": in_bfloat16,
}


def _padded(family: str) -> Any:
    """Return a model of a family whose ids beyond the tokenizer's are likely, so that counting them shows."""
    model = tiny_model(family, vocab_size=PADDED)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] *= 3
    return model


def _trainer(model: Any) -> tuple[ToDiTrainer, dict[str, Tensor]]:
    """Return a trainer of a model, and a batch of all examples with another model's targets."""
    arguments = TrainingArguments(tempfile.gettempdir(), report_to="none", use_cpu=True)
    trainer = ToDiTrainer(model, arguments, _cache(), processing_class=_tokenizer())
    return trainer, trainer.data_collator([_cache()[number] for number in range(len(_cache()))])


@cache
def _cache() -> Cache:
    folder = tempfile.mkdtemp()
    teacher = as_teacher(_padded("llama"), _tokenizer())
    capture(teacher, Examples.from_list(_examples()), folder, k=8, tail_samples=4, codec="fast")
    return open_cache(folder)


def _plain_objective(model: Any) -> Tensor:
    logits = torch.cat([_plain_logits(model, example) for example in _examples()])
    targets = TargetRows.concatenate([_cache()[number].targets for number in range(len(_cache()))])
    return distillation_loss(logits, torch.cat([_labels(example) for example in _examples()]), targets)[0]


def _plain_logits(model: Any, example: Example) -> Tensor:
    """Return what transformers says of a sequence by itself, at its targets, over the ids that there are."""
    tokens = torch.from_numpy(example.token_ids.astype(np.int64))[None]
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0, torch.from_numpy(example.target_mask), :VOCAB].float()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def _require_close(
    name: str, found: Tensor, expected: Tensor, tolerance: float, worst: Callable[[Tensor], Tensor] = torch.max
) -> None:
    off = float(worst((found - expected).detach().abs()))
    assert off <= tolerance, f"{name} is off by {off:.2g}"


def _labels(example: Example) -> Tensor:
    return torch.from_numpy(example.token_ids[1:][example.target_mask[:-1]].astype(np.int64))


@cache
def _examples() -> Sequence[Example]:
    generator = np.random.default_rng(0)
    masks = [np.arange(length) % 3 == 1 for length in (40, 24, 9, 33)]
    return [
        Example(str(number), "made", generator.integers(3, VOCAB, len(mask)).astype(np.uint32), mask)
        for number, mask in enumerate(masks)
    ]


@cache
def _tokenizer() -> Any:
    words = models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
