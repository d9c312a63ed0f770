"""Sums of a training step come in; means over targets and ranks go out. Only the log itself waits for the device."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from todi_offline.errors import DivergedError


class Meter:
    """Sums over targets since the last log, and the time since then."""

    def __init__(self) -> None:
        """Start the clock, with no sums yet."""
        self._sums: dict[str, Tensor] = {}
        self._started = perf_counter()
        self.wait_seconds = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on something else, such as an evaluation."""
        self._started += seconds

    def add(self, sums: dict[str, Tensor], num_tokens: Tensor) -> None:
        """Add the sums of a batch; they stay on its device, so the step does not wait for the device."""
        for name, value in {**sums, "num_tokens": num_tokens.sum()}.items():
            exact = value.float() if value.device.type == "mps" else value.double()  # MPS has no float64
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def means(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all ranks; an empty dict if nothing was added."""
        if not self._sums:
            return {}
        seconds = perf_counter() - self._started
        totals = accelerator.gather(torch.stack(list(self._sums.values()))[None]).sum(0).tolist()
        sums = dict(zip(self._sums, totals, strict=True))
        num_targets, num_tokens = sums.pop("num_targets"), sums.pop("num_tokens")
        means = {name: value / max(num_targets, 1.0) for name, value in sums.items()}
        means["tokens_per_second"] = num_tokens / seconds
        means["data_wait_share"] = self.wait_seconds / seconds
        return means


class FiniteLosses:
    """The first step whose loss was not finite; it stays on the device, so the step does not wait for the device."""

    _NEVER = 2**62

    def __init__(self) -> None:
        """Begin without a loss."""
        self._first: Tensor | None = None

    def add(self, loss: Tensor, step: int) -> None:
        """Check the loss of a micro-batch."""
        here = torch.where(loss.detach().isfinite(), self._NEVER, step)
        self._first = here if self._first is None else torch.minimum(self._first, here)

    def require(self, accelerator: Any, args: Any) -> None:
        """Stop if a loss of any rank was not finite.

        Raises:
            DivergedError: a loss was not finite; the message names the step.
        """
        if self._first is None:
            return
        first = int(accelerator.gather(self._first[None]).min())
        if first < self._NEVER:
            raise DivergedError(
                f"the loss of step {first} is not a finite number, so the weights are lost; lower learning_rate "
                f"({args.learning_rate:g}), raise warmup_steps ({args.warmup_steps:g}), lower max_grad_norm "
                f"({args.max_grad_norm:g}), or use bf16 instead of fp16; earlier checkpoints are intact"
            )
