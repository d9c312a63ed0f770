"""A shard's examples in, its commit record out: what any process can do for a capture that another one coordinates.

Tasks and results may be pickled. A worker holds no lock: see `ShardWriter`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import numpy as np

from todi_offline.cache.format.keys import ContentKeys, KeyIndex, content_key
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.reader import Cache
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.engines import Engine
from todi_offline.data import Example, Examples, examples_from_stream
from todi_offline.errors import (
    CacheCorruptError,
    CacheLockedError,
    OutOfMemoryError,
    TodiError,
    first_line,
    memory_errors,
)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard that is to be captured."""

    shard: int
    examples: bytes
    """An Arrow stream of the shard's examples; a pickled slice of a table would carry the whole table."""
    num_examples: int

    @classmethod
    def of(cls, shard: int, examples: Examples, indices: Sequence[int]) -> "ShardTask":
        """Take the examples with these numbers."""
        return cls(shard, examples.to_stream(indices), len(indices))


@dataclass(frozen=True, slots=True)
class Work:
    """How much was done for some shards."""

    num_shards: int = 0
    num_captured_tokens: int = 0
    """Tokens that the teacher read."""
    num_captured_targets: int = 0
    num_reused_targets: int = 0
    teacher_seconds: float = 0.0

    @classmethod
    def total(cls, parts: "Iterable[Work]") -> "Work":
        """Return the work of several workers, or for several shards."""
        rows = [[getattr(part, field.name) for field in fields(cls)] for part in (cls(), *parts)]
        return cls(*map(sum, zip(*rows, strict=True)))


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
    worker: str
    """The name of the worker that did it."""


class Reusable:
    """Earlier caches of the same teacher, whose rows are copied instead of captured."""

    def __init__(self, cache: Cache) -> None:
        """Sort the content keys of a cache, once."""
        self._cache = cache
        self._index = KeyIndex.of(cache.content_keys)

    def targets(self, examples: Sequence[Example]) -> dict[int, TargetRows]:
        """Return the targets of those examples that the cache holds, by number.

        Raises:
            CacheCorruptError: it has other tokens under an example's content key.
        """
        keys = ContentKeys.of(content_key(example.token_ids, example.target_mask) for example in examples)
        places = self._index.find(keys).tolist()
        return {number: self._read(place, examples[number]) for number, place in enumerate(places) if place >= 0}

    def _read(self, place: int, example: Example) -> TargetRows:
        found = self._cache[place]
        if not np.array_equal(found.token_ids, example.token_ids) or not np.array_equal(
            found.target_mask, example.target_mask
        ):
            raise CacheCorruptError(
                f"{self._cache.root} has other tokens under the content key of {example.id!r}; run `todi-cache verify`"
            )
        return found.targets


@dataclass(frozen=True, slots=True)
class ShardWorker:
    """Captures shards of one cache."""

    name: str
    """For people: `rank 3`."""
    engine: Engine
    writer: ShardWriter
    reusable: Reusable | None = None

    @classmethod
    def start(cls, name: str, engine: Engine, writer: ShardWriter, reuse: Sequence[str]) -> "ShardWorker":
        """Open the caches to reuse.

        Raises:
            CacheMismatchError: one is of another teacher, tokenizer or settings.
        """
        cache = open_reusable(reuse, writer.manifest)
        return cls(name, engine, writer, None if cache is None else Reusable(cache))

    def rows(self, task: ShardTask, report: Callable[[int], None]) -> ShardRows:
        """Return the rows of a shard: those of caches to reuse as they are there, the others from the teacher."""
        examples = examples_from_stream(task.examples)
        copied = {} if self.reusable is None else self.reusable.targets(examples)
        report(sum(len(examples[number].token_ids) for number in copied))
        unknown = [number for number in range(len(examples)) if number not in copied]
        asked = [examples[number] for number in unknown]
        started = perf_counter()
        captured = self._captured(task.shard, asked, report) if asked else []
        teacher_seconds = perf_counter() - started
        targets = copied | dict(zip(unknown, captured, strict=True))
        rows = [
            SequenceRows(example.id, example.source, example.token_ids, example.target_mask, targets[number])
            for number, example in enumerate(examples)
        ]
        num_tokens = sum(len(example.token_ids) for example in asked)
        work = Work(1, num_tokens, sum(map(len, captured)), sum(map(len, copied.values())), teacher_seconds)
        return ShardRows(task.shard, rows, work)

    def _captured(self, shard: int, examples: Sequence[Example], report: Callable[[int], None]) -> list[TargetRows]:
        """Return what the teacher says of some examples of a shard.

        Raises:
            TodiError: it fails; names the shard and, where it can be told, the example.
        """
        settings = self.writer.manifest.settings
        try:
            with memory_errors("what is committed is safe: lower batch_tokens, and run the same command again"):
                return self.engine.targets(examples, settings, report)
        except OutOfMemoryError:  # the shard is not to blame
            raise
        except TodiError as error:
            error.args = (f"shard {shard}: {error}",)
            raise
        except Exception as error:
            failing = (number for number in range(len(examples)) if self._fails(examples[number]))
            culprit = next(failing, None)
            if culprit is None or (culprit == 0 and next(failing, None) == 1):  # the teacher fails at anything
                which = f"shard {shard} (examples {examples[0].id!r} to {examples[-1].id!r})"
            else:
                which = f"example {examples[culprit].id!r} of shard {shard}"
            raise TodiError(
                f"{which} cannot be captured: {type(error).__name__}: {first_line(error)}; what is committed is safe"
            ) from error

    def _fails(self, example: Example) -> bool:
        """Whether the teacher fails at an example by itself."""
        try:
            self.engine.targets([example], self.writer.manifest.settings, lambda _: None)
        except Exception:
            return True
        return False

    def commit(self, shard: ShardRows) -> ShardResult:
        """Write the rows of a shard and commit it, unless another worker of this capture has done so meanwhile."""
        try:
            record = self.writer.write(shard.shard, shard.rows)
        except CacheLockedError:
            found = self.writer.committed(shard.shard)
            if found is None:
                raise
            record = found
        return ShardResult(record, shard.work, self.name)
