"""A chunk's logits in, their exponentials and then their gradients out in the same memory, in few passes over it.

One array serves two temperatures. It holds the exponentials at the larger of T and 1. The exponentials at the smaller
one are a power, above one, of these, so a value that is 0 in the array is 0 at both.
"""

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline import tuning

logger = logging.getLogger(__name__)


def exponentiate_rows(
    logits: Float[Tensor, "target vocab"], least: Float[Tensor, " target"], temperature: float
) -> tuple[Float[Tensor, " target"], Float[Tensor, " target"], Float[Tensor, " target"]]:
    """Turn logits into exp((logit - largest) / the larger of T and 1).

    Return the largest logit of each row, `least` at least, and the sums of exp((logit - largest) / T), and of
    exp(logit - largest).
    """
    exponentiate = compiled_for_cuda(exponentiate_piece, logits.device.type)
    settings = max(temperature, 1.0), _power(temperature)
    parts = [exponentiate(logits[rows], least[rows], *settings) for rows in pieces(logits)]
    largest, sums, power_sums = (torch.cat(part) for part in zip(*parts, strict=True))
    return (largest, sums, power_sums) if temperature >= 1 else (largest, power_sums, sums)


def combine_rows(
    exponentials: Float[Tensor, "target vocab"],
    factor: Float[Tensor, " target"],
    factor_at_1: Float[Tensor, " target"],
    temperature: float,
) -> None:
    """Turn the exponentials of `exponentiate_rows` into the weighted sum of those at T and at 1."""
    factor, power_factor = (factor, factor_at_1) if temperature >= 1 else (factor_at_1, factor)
    combine = compiled_for_cuda(combine_piece, exponentials.device.type)
    for rows in pieces(exponentials):
        combine(exponentials[rows], factor[rows], power_factor[rows], _power(temperature))


def exponentiate_piece(
    logits: Tensor, least: Tensor, temperature: float, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exp((logit - largest) / temperature); return the largest, and the sums of both exponentials."""
    largest = torch.maximum(logits.amax(-1), least)
    logits.sub_(largest[:, None])
    if temperature != 1:
        logits.div_(temperature)
    sums = logits.exp_().sum(-1)
    return largest, sums, sums.clone() if power == 1 else logits.pow(power).sum(-1)


def combine_piece(exponentials: Tensor, factor: Tensor, power_factor: Tensor, power: float) -> None:
    """Turn x into factor * x + power_factor * x ** power, a factor a row."""
    if power == 1:
        exponentials.mul_((factor + power_factor)[:, None])
    else:
        powers = exponentials.pow(power).mul_(power_factor[:, None])
        torch.addcmul(powers, exponentials, factor[:, None], out=exponentials)


@functools.cache
def compiled_for_cuda(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return the function, compiled on CUDA, where each logit is then read and written once instead of three times."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return function
    if missing := _missing_for_triton():
        logger.warning("%s is not compiled because there is no %s; the loss takes longer", function.__name__, missing)
        return function
    return torch.compile(function, dynamic=True)


def _missing_for_triton() -> str:
    """Return the name of what triton, which compiles a launcher for each kernel, would not find."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if compiler is None:
        return "C compiler (CC, gcc or clang)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{header}, which a package such as python3-dev has"


def _power(temperature: float) -> float:
    return max(temperature, 1 / temperature)


def pieces(logits: Float[Tensor, "target vocab"]) -> list[slice]:
    """Return the rows to pass over at a time: on a CPU few, so that its cache holds them from pass to pass."""
    step = max(len(logits), 1)
    if logits.device.type == "cpu":
        step = min(step, max(1, tuning.CPU_PASS_BYTES // (logits.itemsize * logits.shape[1])))
    return [slice(start, start + step) for start in range(0, max(len(logits), 1), step)]  # one where there are no rows
