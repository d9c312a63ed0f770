"""The settings of a capture in, whatever captures its shards out: this process, or actors elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.attempts import Attempts
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import TeacherDescription
from todi_offline.capturing.in_process import InProcess
from todi_offline.capturing.meter import Report
from todi_offline.capturing.work import ShardResult
from todi_offline.errors import ConfigError
from todi_offline.teacher.in_transformers import Teacher


class Workers(AbstractContextManager["Workers"], Protocol):
    """What a capture asks of those who do its work; leaving the context lets go of their teachers."""

    def describe(self) -> TeacherDescription:
        """Return what a cache records of the teacher."""

    def capture(self, writer: ShardWriter, attempts: Attempts, report: Report) -> Iterator[ShardResult]:
        """Yield the result of each shard once it is committed, in any order; no work goes on when this ends.

        May be called again, for other shards, when it has ended without an error.

        Raises:
            TodiError: a shard cannot be captured.
        """


def start_workers(config: CaptureConfig, name: str, teacher: Teacher | None, *, commits: bool = True) -> Workers:
    """Return the workers that the settings ask for; `name` is that of this process.

    Without `commits`, this process holds a part of the teacher, and another process commits the shards.

    Raises:
        ModelError: the teacher cannot be loaded.
        ConfigError: Ray is asked for and is not installed, or has no use for a teacher that is loaded here.
    """
    if config.ray.ray_actors:
        if teacher is not None:
            raise ConfigError("actors of Ray load the teacher themselves; name it instead of giving a loaded one")
        from todi_offline.capturing.ray_actors import RayActors

        return RayActors(config)
    return InProcess(config, name, teacher, commits=commits)
