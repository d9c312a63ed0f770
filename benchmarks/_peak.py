"""A step in, the most memory that torch's allocator handed out at once during it out."""

import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> float:
    """Return the peak in bytes, without the step's inputs and the working memory of matrix libraries."""
    gc.collect()
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
