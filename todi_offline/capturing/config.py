"""The settings of a capture, and what it reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.capturing.work import Work
from todi_offline.data import DataConfig
from todi_offline.errors import ConfigError
from todi_offline.teacher.in_transformers import TeacherConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Actors of Ray that do the work of a capture."""

    ray_actors: int = 0
    """Number of Ray actors that capture, each with its own teacher; 0 does not use Ray."""
    ray_gpus: float = 0.0
    """GPUs that each actor takes."""
    ray_cpus: float = 1.0
    """CPUs that each actor takes."""
    ray_address: str | None = None
    """Address of the Ray cluster: `auto` finds a running one; by default one is started on this machine."""
    ray_attempts: int = 3
    """Attempts at a shard, each in a new actor, before the capture stops and names the shard."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ConfigError: a value is out of range.
        """
        for name, least in {"ray_actors": 0, "ray_gpus": 0, "ray_cpus": 0, "ray_attempts": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The engine that runs the teacher."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """The library that runs the teacher; vLLM needs `pip install 'todi-offline[vllm]'`."""
    engine_set: dict[str, Any] = field(default_factory=dict, metadata={"named_values": True})
    """An argument of `vllm.LLM`, such as tensor_parallel_size=8. May be repeated."""
    engine_timeout: float = 600.0
    """Stop the capture if vLLM does not respond for this many seconds while it loads or runs the teacher."""
    engine_untested: bool = False
    """Try a version of vLLM that this release was not tested with."""

    def __post_init__(self) -> None:
        """Refuse arguments of an engine that is not used, and those that other settings decide.

        Raises:
            ConfigError: a value is out of range, or contradicts another.
        """
        if self.engine_timeout <= 0:
            raise ConfigError(f"engine_timeout is {self.engine_timeout:g}; expected a number of seconds above 0")
        if self.engine == "transformers" and self.engine_set:
            raise ConfigError(f"--engine-set {min(self.engine_set)} is for --engine vllm; leave it out")
        if decided := sorted(_DECIDED_ELSEWHERE.keys() & self.engine_set.keys()):
            raise ConfigError(f"--engine-set {decided[0]} cannot be set: {_DECIDED_ELSEWHERE[decided[0]]}")


_DECIDED_ELSEWHERE = {
    "model": "--teacher names the model",
    "tokenizer": "vLLM is sent token ids; the tokenizer is the teacher's",
    "dtype": "--dtype decides it",
    "trust_remote_code": "--trust-remote-code decides it",
    "worker_extension_cls": "the targets are computed there",
    "runner": "targets are made of a model that generates",
    "data_parallel_size": "use --ray-actors for several copies of the teacher",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureConfig:
    """All settings of a capture."""

    out: str
    """The cache to write: a folder or URL. A capture adds to a finished cache the sequences that the cache lacks."""
    reuse: tuple[str, ...] = ()
    """A cache of the same teacher; sequences that it holds are copied instead of captured. May be repeated."""
    skip_failed: bool = False
    """Leave out an example at which the teacher fails, and record it in the cache. By default the capture ends."""
    teacher: TeacherConfig
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheSettings = field(default_factory=CacheSettings)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        """Refuse to split a teacher over ranks where other processes hold it.

        Raises:
            ConfigError: `tp` contradicts another setting.
        """
        if self.teacher.tp > 1 and (self.engine.engine != "transformers" or self.ray.ray_actors):
            raise ConfigError(
                "tp works only with --engine transformers in ranks of torchrun; with Ray or vLLM, use --engine vllm "
                f"--engine-set tensor_parallel_size={self.teacher.tp}"
            )


@dataclass(frozen=True, slots=True)
class CaptureSummary:
    """What a capture did."""

    num_sequences: int
    num_tokens: int
    num_targets: int
    num_captured_tokens: int
    """Tokens that the teacher read in this run: fewer than `num_tokens` if the run resumed an earlier one."""
    num_captured_targets: int
    """Targets that this run computed."""
    num_reused_targets: int
    """Targets that this run copied from other caches."""
    num_known_sequences: int
    """Sequences of the data set that the cache held already, from the capture of other data."""
    teacher_seconds: float
    bytes_per_target: float
    mean_topk_mass: float
    left_out: Mapping[str, str]
    """The ids of the examples at which the teacher failed, each with the reason. The cache lacks these examples."""
    data_report: Any
    """What `load_examples` cut and dropped."""
    workers: Mapping[str, Work]
    """What each worker did in this run, by its name."""
