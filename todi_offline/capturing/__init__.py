"""Stage 1: a teacher and a data set in, a cache out.

coordinator.py   what a capture does: plan, begin the cache, have its shards captured, seal it
config.py        its settings, and its summary
jobs.py          what is to be captured -> the tasks of the shards
engines.py       a shard's examples -> the teacher's targets, whichever library runs the teacher
loading.py       the settings -> the engine that they ask for
work.py          a shard's examples -> its commit record: an engine, and a writer that needs no lock
in_process.py    shards captured by this process, each written while the teacher reads the next
"""

from todi_offline.capturing.config import CaptureConfig, CaptureSummary, Progress
from todi_offline.capturing.coordinator import capture, capture_from

__all__ = ["CaptureConfig", "CaptureSummary", "Progress", "capture", "capture_from"]
