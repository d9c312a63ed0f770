"""A step in; the most memory that torch's allocator handed out during it, and a clock that waits for a device, out."""

import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> float:
    """Return the peak in bytes, without the step's inputs and the working memory of matrix libraries."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes: list[tuple[float, int, int]] = sorted(
        (e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"
    )
    return max(itertools.accumulate(num_bytes for *_, num_bytes in changes))


def now(device: str = "cpu") -> float:
    """Return the seconds of a clock, once the device has done all that it was asked for."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
