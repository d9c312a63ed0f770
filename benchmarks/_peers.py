"""The inputs of a step in, the steps of the installed public libraries out; `loss` describes each."""

import importlib
import importlib.metadata
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.targets.sparse import SparseTargets

Step = Callable[[], object]
Losses = dict[str, Callable[[], Any]]

FORMS: dict[str, dict[str, object]] = {"": {"compiled": False}, ", by 128": {"compiled": False, "chunk_size": 128}}
"""Arguments of the losses that go by chunks: their own 1,024 targets, and fewer."""
COMPILED: dict[str, dict[str, object]] = {", compiled": {"compiled": True}} if shutil.which("g++") else {}


@dataclass(frozen=True, slots=True)
class Given:
    """A student's head and hidden states, the labels, and one teacher in all the forms that some method asks for."""

    hidden: Float[Tensor, "target d"]
    weight: Float[Tensor, "vocab d"]
    labels: Int[Tensor, " target"]
    teacher_hidden: Float[Tensor, "target d"]
    teacher_weight: Float[Tensor, "vocab d"]
    teacher_logits: Float[Tensor, "target vocab"]
    bucket: SparseTargets
    sampled: SparseTargets

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return those that a step is to make."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def peers() -> dict[str, str]:
    """Return the version of each peer, or why it is not measured."""
    found = {}
    for name, (needed, _) in PEERS.items():
        missing = [module for module in needed if find_spec(module) is None]
        version = None if missing else importlib.metadata.version(needed[0])
        found[name] = version or f"not measured, without {', '.join(missing)}"
    if not COMPILED:
        found["compiled"] = "not measured, without g++"
    return found


def peer_steps(given: Given) -> dict[str, Step]:
    """Return the steps of the peers that can be measured."""
    losses: Losses = {}
    for needed, build in PEERS.values():
        if all(find_spec(module) for module in needed):
            with warnings.catch_warnings(action="ignore"):  # trl's, that it is experimental
                losses |= build(given)
    return {name: partial(_step, given, loss) for name, loss in losses.items()}


def _step(given: Given, loss: Callable[[], Any]) -> object:
    return given.gradients(loss())


def _trl(given: Given) -> Losses:
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    chunked = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def dense() -> Any:
        logits = given.hidden @ given.weight.T
        return trainer.generalized_jsd_loss(logits[None], given.teacher_logits[None], given.labels[None], beta=0.0)

    def tiled() -> Any:
        student, teacher = (given.hidden, given.weight), (given.teacher_hidden, given.teacher_weight)
        return chunked.apply(*student, None, *teacher, None, 0.0)[0].mean()

    return {"trl, dense": dense, "trl, tiled": tiled}


def _liger(given: Given) -> Losses:
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    arguments = given.hidden, given.weight, given.teacher_hidden, given.teacher_weight, given.labels
    return {f"liger{name}": partial(loss(beta=0.0, **form), *arguments) for name, form in (FORMS | COMPILED).items()}


def _axolotl(given: Given) -> Losses:
    kernel = importlib.import_module("axolotl.integrations.kd.kernels").LigerFusedLinearKLTopKLogprobLoss
    ids, logprobs = given.bucket.ids[None], given.bucket.logprobs.log_softmax(-1)[None]
    mask, labels = torch.ones_like(ids), given.labels.roll(1)[None]  # it reads the label one place later

    def loss(form: dict[str, object]) -> Any:
        total = kernel(beta=0.0, **form)(given.weight, given.hidden[None], ids, logprobs, mask, labels)
        return total / len(given.labels)

    return {f"axolotl{name}": partial(loss, form) for name, form in FORMS.items()}


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Given], Losses]]] = {
    "trl": (("trl",), _trl),
    "liger": (("liger_kernel",), _liger),
    "axolotl": (("axolotl", "liger_kernel", "addict", "peft", "pydantic"), _axolotl),
}
"""The modules that each needs, and its losses."""
