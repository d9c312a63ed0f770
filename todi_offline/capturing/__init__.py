"""Stage 1: a teacher and a data set in, a cache out.

coordinator.py   what a capture does: plan, begin the cache, have its shards captured, seal it
config.py        its settings, and its summary
jobs.py          what is to be captured -> the tasks of the shards
ranks.py         the processes that torchrun or accelerate starts, which share the shards
workers.py       what captures shards: in_process.py, this process, or ray_actors.py, actors of a cluster
attempts.py      shards whose workers have died -> what to try next
notes.py         what a process leaves in the cache, for the case that it dies
work.py          a shard's examples -> its commit record: an engine, and a writer that needs no lock
loading.py       the settings -> the engine that they ask for
vllm_engine.py   the engine that is vLLM; see teacher/in_vllm
engines.py       a shard's examples -> the teacher's targets, whichever library runs the teacher
meter.py         what workers report -> how far the capture is
"""

from todi_offline.capturing.config import CaptureConfig, CaptureSummary
from todi_offline.capturing.coordinator import capture
from todi_offline.capturing.meter import CaptureProgress, Progress

__all__ = ["CaptureConfig", "CaptureProgress", "CaptureSummary", "Progress", "capture"]
