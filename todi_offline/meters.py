"""What a training step measures in, means over targets and over ranks out; nothing waits for a device on the way."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from todi_offline.errors import DivergedError


class Meter:
    """Sums over targets since the last log, and the clock of that time."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums: dict[str, Tensor] = {}
        self._started = perf_counter()
        self.wait_seconds = 0.0

    def add(self, sums: dict[str, Tensor], num_tokens: Tensor) -> None:
        """Add a batch's sums; they stay on its device, so that nothing waits for it."""
        for name, value in {**sums, "num_tokens": num_tokens.sum()}.items():
            exact = value.float() if value.device.type == "mps" else value.double()  # MPS has no float64
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    def means(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all ranks, or nothing where nothing was added."""
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
    """The first step whose loss was not finite, kept where the losses are: nothing waits for it."""

    _NEVER = 2**62

    def __init__(self) -> None:
        """Begin with none."""
        self._first: Tensor | None = None

    def add(self, loss: Tensor, step: int) -> None:
        """Look at the loss of a micro-batch."""
        here = torch.where(loss.detach().isfinite(), self._NEVER, step)
        self._first = here if self._first is None else torch.minimum(self._first, here)

    def require(self, accelerator: Any, args: Any) -> None:
        """Refuse to go on where a loss of any rank was not finite.

        Raises:
            DivergedError: naming the step.
        """
        if self._first is None:
            return
        first = int(accelerator.gather(self._first[None]).min())
        if first < self._NEVER:
            raise DivergedError(
                f"the loss of step {first} is not a finite number, so the weights are lost; lower learning_rate "
                f"({args.learning_rate:g}), raise warmup_steps ({args.warmup_steps:g}), set max_grad_norm "
                f"({args.max_grad_norm:g}) or, in place of fp16, bf16; checkpoints of earlier steps are whole"
            )
