"""A shard's examples in, its commit record out: what any process can do for a capture that another one coordinates.

Tasks and results may be pickled. A worker holds no lock: see `ShardWriter`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.reader import Cache
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.engines import Engine
from todi_offline.data import Example, examples_from_stream
from todi_offline.errors import CacheCorruptError


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard that is to be captured."""

    shard: int
    examples: bytes
    """An Arrow stream of the shard's examples; a pickled slice of a table would carry the whole table."""
    places: tuple[int, ...]
    """Where the caches to reuse have each example, or -1."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much was done for a shard."""

    num_captured_tokens: int
    """Tokens that the teacher read."""
    num_captured_targets: int
    num_reused_targets: int
    teacher_seconds: float


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The rows of a shard that is captured and not written yet."""

    shard: int
    rows: list[SequenceRows]
    work: Work


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A shard that is committed."""

    record: CommitRecord
    work: Work


@dataclass(frozen=True, slots=True)
class ShardWorker:
    """Captures shards of one cache."""

    engine: Engine
    writer: ShardWriter
    reused: Cache | None = None

    def rows(self, task: ShardTask, report: Callable[[int], None]) -> ShardRows:
        """Return the rows of a shard: those of caches to reuse as they are there, the others from the teacher."""
        examples = examples_from_stream(task.examples)
        copied = {index: self._copied(place, examples[index]) for index, place in enumerate(task.places) if place >= 0}
        unknown = [index for index in range(len(examples)) if index not in copied]
        report(sum(len(examples[index].token_ids) for index in copied))
        started = perf_counter()
        asked = [examples[index] for index in unknown]
        captured = self.engine.targets(asked, self.writer.manifest.settings, report) if asked else []
        teacher_seconds = perf_counter() - started
        targets = copied | dict(zip(unknown, captured, strict=True))
        rows = [
            SequenceRows(example.id, example.source, example.token_ids, example.target_mask, targets[index])
            for index, example in enumerate(examples)
        ]
        num_tokens = sum(len(example.token_ids) for example in asked)
        work = Work(num_tokens, sum(map(len, captured)), sum(map(len, copied.values())), teacher_seconds)
        return ShardRows(task.shard, rows, work)

    def commit(self, shard: ShardRows) -> ShardResult:
        """Write the rows of a shard and commit it."""
        return ShardResult(self.writer.write(shard.shard, shard.rows), shard.work)

    def _copied(self, place: int, example: Example) -> TargetRows:
        """Read the targets of an example from a cache that has them.

        Raises:
            CacheCorruptError: it has them under the example's content key, and for other tokens.
        """
        assert self.reused is not None, "it has a place there"
        found = self.reused[place]
        if not np.array_equal(found.token_ids, example.token_ids) or not np.array_equal(
            found.target_mask, example.target_mask
        ):
            raise CacheCorruptError(
                f"{self.reused.root} has other tokens under the content key of {example.id!r}; run `todi-cache verify`"
            )
        return found.targets
