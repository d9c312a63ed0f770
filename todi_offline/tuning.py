"""A device in, how much of a computation is made at a time there out: numbers of speed and memory.

No result depends on them but for rounding. What a CPU passes over at a time should stay in its caches.
"""

import functools

import torch

CPU_TARGET_BYTES = 64 * 2**20
"""Of a chunk of a teacher's logits in float32, on a CPU."""

CPU_LOSS_BYTES = 72 * 2**20
"""Of a chunk of a student's logits, and of all else of their size, on a CPU. With a head of [49152, 576] sizes from 24
to 96 MiB were tried, and the largest was the fastest: every chunk reads the head and adds to all of its gradient."""

CPU_BLOCK_IDS = 1024
"""Rows of a head that a CPU multiplies at a time. For 342 rows of hidden states and a head of [49152, 576] its matrix
library takes 140 ms this way and 169 ms at once; for 128 rows and [32000, 2048] 137 ms and 192 ms. The other two
products gain nothing."""

CPU_PASS_BYTES = 4 * 2**20
"""Of a student's logits that a CPU passes over at a time. Sizes from 0.5 to 128 MiB were tried: half and twice this
size are about as fast; the whole chunk at once takes twice as long at T = 2."""

CPU_COPY_BYTES = 8 * 2**20
"""Of a teacher's logits that a CPU copies at a time: larger copies are new pages, and leave its cache."""

TOP_K_GROUP = 8
"""Columns of which the largest is looked at first."""

DEVICE_SHARE = 1 / 16
"""Of a device's free memory, for a chunk of logits; some arrays of its size stand beside it."""

DEVICE_BYTES = (64 * 2**20, 512 * 2**20)
"""Of a chunk on a device: at least, and at most. A chunk reads the head twice and its gradient once, so it should have
about as many rows as the device does operations for each byte that it reads: several hundred. An estimate, not a
measurement."""


def chunk_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the bytes of a chunk of logits: `on_cpu` on a CPU, elsewhere a share of the memory that is free.

    It is a power of two, and decided once in a process for each device, so that kernels round alike all the time.
    """
    return on_cpu if device.type == "cpu" else _device_bytes(device)


@functools.cache
def _device_bytes(device: torch.device) -> int:
    least, most = DEVICE_BYTES
    share = int(free_bytes(device) * DEVICE_SHARE)
    return min(max(1 << (max(share, 1).bit_length() - 1), least), most)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that torch can still take, and what torch has taken and does not use.

    Of a device that does not tell, 0.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    return 0
