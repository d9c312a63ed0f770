"""A shard's examples in, its commit record out: what any process can do for a capture that another one coordinates.

Tasks and results may be pickled. A worker holds no lock: see `ShardWriter`.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from types import MappingProxyType

import numpy as np

from todi_offline.cache.format.keys import ContentKeys, KeyIndex, content_key
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence, SequenceRows
from todi_offline.cache.reader import Cache, read_all
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.engines import Engine
from todi_offline.data import Example, Examples, examples_from_stream
from todi_offline.errors import (
    CacheCorruptError,
    CacheLockedError,
    EngineError,
    OutOfMemoryError,
    TeacherOutputError,
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
    left_out: dict[str, str]
    """The ids of the examples that it lacks, each with the reason."""
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
        places = {number: place for number, place in enumerate(self._index.find(keys).tolist()) if place >= 0}
        found = zip(places, read_all(self._cache, places.values()), strict=True)
        return {number: self._targets_of(sequence, examples[number]) for number, sequence in found}

    def _targets_of(self, found: CachedSequence, example: Example) -> TargetRows:
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
    skip_failed: bool = False
    """Whether an example at which the teacher fails is left out, instead of raising an error."""

    @classmethod
    def start(
        cls, name: str, engine: Engine, writer: ShardWriter, reuse: Sequence[str], *, skip_failed: bool
    ) -> "ShardWorker":
        """Open the caches to reuse.

        Raises:
            CacheMismatchError: one is of another teacher, tokenizer or settings.
        """
        cache = open_reusable(reuse, writer.manifest)
        return cls(name, engine, writer, None if cache is None else Reusable(cache), skip_failed)

    def rows(
        self, task: ShardTask, report: Callable[[int], None], left_out: Mapping[int, str] = MappingProxyType({})
    ) -> ShardRows:
        """Return the rows of a shard: those of caches to reuse as they are there, the others from the teacher.

        `left_out` has the numbers of examples that the teacher is not to read, each with the reason.

        Raises:
            TodiError: the teacher fails; names the shard and, where it can be told, the example.
        """
        examples = examples_from_stream(task.examples)
        copied = {} if self.reusable is None else self.reusable.targets(examples)
        report(sum(len(examples[number].token_ids) for number in copied))
        unknown = [number for number in range(len(examples)) if number not in copied and number not in left_out]
        started = perf_counter()
        answers = self._answers(task.shard, [examples[number] for number in unknown], report) if unknown else []
        teacher_seconds = perf_counter() - started
        found = dict(zip(unknown, answers, strict=True))
        captured = {number: answer for number, answer in found.items() if not isinstance(answer, str)}
        failed = {**left_out, **{number: answer for number, answer in found.items() if isinstance(answer, str)}}
        targets = copied | captured
        if not targets:
            raise TodiError(
                f"the teacher fails at each of the {len(examples)} examples of shard {task.shard}; at "
                f"{examples[0].id!r}: {failed[0]}; committed work is safe. Remove these examples from the data"
            )
        rows = [
            SequenceRows(example.id, example.source, example.token_ids, example.target_mask, targets[number])
            for number, example in enumerate(examples)
            if number in targets
        ]
        num_tokens = sum(len(examples[number].token_ids) for number in captured)
        counts = (sum(map(len, captured.values())), sum(map(len, copied.values())))
        work = Work(1, num_tokens, *counts, teacher_seconds)
        return ShardRows(task.shard, rows, {examples[number].id: failed[number] for number in sorted(failed)}, work)

    def read(self, task: ShardTask, number: int) -> None:
        """Read one example of a shard, to see whether this process survives it; an error is left to `rows`."""
        with contextlib.suppress(Exception):
            example = examples_from_stream(task.examples)[number]
            self.engine.targets([example], self.writer.manifest.settings, lambda _: None)

    def _answers(
        self, shard: int, examples: Sequence[Example], report: Callable[[int], None]
    ) -> list[TargetRows] | list[TargetRows | str]:
        """Return what the teacher says of each of some examples of a shard, or the reason to leave the example out.

        Raises:
            TodiError: it fails; names the shard and, where it can be told, the example.
        """
        settings = self.writer.manifest.settings
        try:
            with memory_errors("committed work is safe: lower batch_tokens, and run the same command again"):
                return self.engine.targets(examples, settings, report)
        except OutOfMemoryError:  # the shard is not to blame
            raise
        except TodiError as error:
            if self.skip_failed and isinstance(error, TeacherOutputError):
                return self._answers_but_failed(shard, examples)
            error.args = (f"shard {shard}: {error}",)
            raise
        except Exception as error:
            if self.skip_failed:
                return self._answers_but_failed(shard, examples)
            failing = (number for number in range(len(examples)) if self._failure(examples[number]))
            culprit = next(failing, None)
            if culprit is None or (culprit == 0 and next(failing, None) == 1):  # the teacher fails at anything
                which = f"shard {shard} (examples {examples[0].id!r} to {examples[-1].id!r})"
            else:
                which = f"example {examples[culprit].id!r} of shard {shard}"
            raise TodiError(
                f"{which} cannot be captured: {type(error).__name__}: {first_line(error)}; committed work is safe"
            ) from error

    def _answers_but_failed(self, shard: int, examples: Sequence[Example]) -> list[TargetRows | str]:
        """Return what the teacher says of those examples that it can read by themselves, and why it cannot read others.

        Raises:
            TodiError: it can read each by itself, but not all of them.
        """
        failures = [self._failure(example) for example in examples]
        readable = [example for example, failure in zip(examples, failures, strict=True) if failure is None]
        if len(readable) == len(examples):
            raise TodiError(
                f"the teacher can read each example of shard {shard} alone, but not all of them together; lower "
                "batch_tokens, and run the same command again"
            )
        rows = iter(self.engine.targets(readable, self.writer.manifest.settings, lambda _: None) if readable else [])
        return [next(rows) if failure is None else failure for failure in failures]

    def _failure(self, example: Example) -> str | None:
        """Return why the teacher fails at an example by itself, or None where it does not.

        Raises:
            EngineError: what runs the teacher has died, or does not answer: no example is to blame.
        """
        try:
            self.engine.targets([example], self.writer.manifest.settings, lambda _: None)
        except EngineError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return None

    def commit(self, shard: ShardRows) -> ShardResult:
        """Write the rows of a shard and commit it, unless another worker of this capture has done so meanwhile."""
        try:
            record = self.writer.write(shard.shard, shard.rows, shard.left_out)
        except CacheLockedError:
            found = self.writer.committed(shard.shard)
            if found is None:
                raise
            record = found
        return ShardResult(record, shard.work, self.name)
