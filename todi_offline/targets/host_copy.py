"""Tensors on a device in, the same numbers on the host out, copied while the device computes what comes next.

On CUDA devices alone the host does not wait: torch copies into pinned memory, and an event tells when the copies are
done. The host of every other device waits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

QUEUED_DEVICES = ("cuda",)
"""Types of devices that copy behind the host's back."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Tensors on their way to the host."""

    copies: Mapping[str, Tensor]
    """On the host. Before `done` their numbers are undefined."""
    done: torch.cuda.Event | None
    """The end of the copies; None where they are done."""

    @classmethod
    def start(cls, tensors: Mapping[str, Tensor | None]) -> "HostCopy":
        """Queue the copies behind the work that makes these tensors, all of one device. None has no copy."""
        there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        device = next(iter(there.values())).device
        if device.type not in QUEUED_DEVICES:
            return cls({name: tensor.cpu() for name, tensor in there.items()}, None)
        copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in there.items()}
        return cls(copies, torch.cuda.current_stream(device).record_event())

    def read(self) -> Mapping[str, Tensor]:
        """Wait until the copies are done, and return them."""
        if self.done is not None:
            self.done.synchronize()
        return self.copies


def queued_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for the work that is queued there.

    torch stages pageable memory before it returns, so the host may change or free the tensor at once.
    """
    return tensor.to(device, non_blocking=device.type in QUEUED_DEVICES)
