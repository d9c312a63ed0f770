"""A shard's examples in, the teacher's targets at their supervised positions out, whatever runs the teacher."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example
from todi_offline.teacher.in_transformers import (
    QueuedTargets,
    Teacher,
    length_batches,
    num_positions,
    queue_targets,
    teacher_fingerprint,
    tokenizer_json,
)

_RECORDED = ("todi-offline", "numpy", "pyarrow", "numcodecs", "pcodec")


@dataclass(frozen=True, slots=True)
class TeacherDescription:
    """What a cache records of its teacher."""

    vocab_size: int
    """Ids that the tokenizer and the teacher's head know."""
    teacher: dict[str, Any]
    """The teacher's fingerprint."""
    tokenizer: dict[str, Any]
    """The tokenizer's fingerprint."""
    tokenizer_json: str | None
    """The tokenizer as `tokenizers` reads it, where it has such a form."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that decide the bytes of a cache; see `recorded_versions`."""
    engine: dict[str, str] = field(default_factory=dict)
    """What runs the teacher, for the recipe of the part: its name and dtype, say; empty for transformers, whose dtype
    the fingerprint has. A capture goes on with the engine that began it."""


def recorded_versions(*engine: str) -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes of a cache: those named, and those of all captures."""
    return {name: version(name) for name in (*_RECORDED, *engine)}


class Engine(Protocol):
    """What a capture asks of a teacher."""

    def describe(self) -> TeacherDescription:
        """Return what a cache records of the teacher."""

    def targets(
        self, examples: Sequence[Example], settings: CacheSettings, report: Callable[[int], None]
    ) -> list[TargetRows]:
        """Return the targets of each example, in order; `report` is called with the tokens that were just read.

        The examples are those of a whole shard, or what is left of it: the engine batches them as it likes.

        Raises:
            TeacherOutputError: a logit is NaN or +inf; names the example and the position.
        """

    def close(self) -> None:
        """Let go of the devices and processes that the engine holds."""


@dataclass(frozen=True, slots=True)
class TransformersEngine:
    """A teacher that transformers runs, on batches of examples of one padded length."""

    teacher: Teacher
    batch_tokens: int

    def describe(self) -> TeacherDescription:
        """Return what a cache records of the teacher; see `Engine`."""
        return TeacherDescription(
            vocab_size=self.teacher.vocab_size,
            teacher=teacher_fingerprint(self.teacher),
            tokenizer=tokenizer_fingerprint(self.teacher.tokenizer),
            tokenizer_json=tokenizer_json(self.teacher.tokenizer),
            versions=recorded_versions("torch", "transformers"),
        )

    def targets(
        self, examples: Sequence[Example], settings: CacheSettings, report: Callable[[int], None]
    ) -> list[TargetRows]:
        """Return the targets of each example, in order; see `Engine`."""
        lengths = [len(example.token_ids) for example in examples]
        rows: dict[int, TargetRows] = {}
        batches = length_batches(lengths, self.batch_tokens, num_positions(self.teacher))
        queued = (queue_targets(self.teacher, [examples[index] for index in batch], settings) for batch in batches)
        for batch, found in zip(batches, _read_behind(queued), strict=True):
            rows |= zip(batch, found, strict=True)
            report(sum(lengths[index] for index in batch))
        return [rows[index] for index in range(len(examples))]

    def close(self) -> None:
        """Do nothing: the memory is that of this process."""


def _read_behind(queued: Iterable[QueuedTargets]) -> Iterator[list[TargetRows]]:
    """Read the targets of each batch once the next batch is queued, so that a device computes while the host reads."""
    previous: QueuedTargets | None = None
    for batch in queued:
        if previous is not None:
            yield previous.read()
        previous = batch
    if previous is not None:
        yield previous.read()
