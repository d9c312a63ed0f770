"""Nouns: what a plan says. `planning` makes it, the command line prints it."""

from dataclasses import dataclass
from typing import Literal

from todi_offline.costing.sizes import ModelSize
from todi_offline.costing.storage import Amount
from todi_offline.costing.studied import Shares
from todi_offline.data import DataReport


@dataclass(frozen=True, slots=True)
class Duration:
    """How long something takes, and how that is known."""

    seconds: float
    basis: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A shape and an encoding that the cache could have, and what it costs."""

    k: int
    tail_samples: int
    encoding: str
    bytes_per_target: float | None
    """All bytes of the cache over its targets, as a capture reports them."""
    total_bytes: int | None
    kept_mass: float | None
    """Mean probability of the kept ids together; known from a probe alone."""
    basis: Literal["probe", "study", "unknown"]
    """Where the bytes come from: this data and teacher, or SmolLM2 over Dolly."""
    shares: Shares
    is_asked: bool = False
    is_suggested: bool = False


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """What training a student from the cache takes."""

    num_parameters: int
    num_steps: int
    flops: float
    duration: Duration | None
    memory_bytes: int
    """Of weights, gradients and AdamW's moments in float32; activations come on top."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture will cost."""

    report: DataReport
    """What was cut and dropped."""
    amount: Amount
    """What the capture adds to the cache."""
    num_known_sequences: int
    """Sequences of the data set that the cache holds already."""
    num_read_sequences: int
    """Sequences that the teacher has yet to read: neither committed nor copied from other caches."""
    num_read_tokens: int
    num_read_targets: int
    teacher: ModelSize
    weight_bytes: int
    """Of the teacher in memory."""
    peak_bytes: int | None
    """Memory that the probe used at most: of the accelerator, or of the process."""
    flops: float
    duration: Duration | None
    choices: tuple[Choice, ...]
    suggestion: str
    num_files: int
    """Objects that the capture adds to the cache."""
    shard_bytes: int | None
    """Of a full shard as it is asked for."""
    shard_memory_bytes: int
    """Rows of a full shard in memory; two are held at a time."""
    student: StudentPlan | None
