"""Shards and the deaths of their workers in, what to try next out.

A worker that dies leaves the shards that it had. Any of them may have killed it, or none. So each is tried again by a
worker that does nothing else, and that reads the examples of the shard one by one before it captures all of them. An
example at which two workers died is named, or left out.

A driver sees its workers die, and gives their shards to other workers. A process that is a worker itself cannot see its
own death. It leaves notes in the cache instead, and the next run of the capture finds them.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from todi_offline.cache.format.notes import Note
from todi_offline.capturing.notes import Notes
from todi_offline.capturing.work import ShardTask
from todi_offline.errors import TodiError

logger = logging.getLogger(__name__)

_ALL_DIED = "each worker that read it died"


@dataclass(eq=False, slots=True)
class Attempt:
    """A shard on its way through the workers."""

    shard: int
    num_examples: int
    task: Any
    """What a worker is given."""
    is_alone: bool = False
    """Whether its worker is to do nothing else."""
    reading: int | None = None
    """The example that its worker reads by itself."""
    num_read: int = 0
    """The first examples of the shard, which a worker has read by themselves and survived."""
    ended: list[int | None] = field(default_factory=list)
    """For each worker that ended, the example that it was reading by itself."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Examples that are not to be captured, each with the reason."""
    was_named: bool = False
    """Whether an earlier run has told the user of the culprit."""

    @classmethod
    def of(cls, task: ShardTask, note: Note | None = None) -> "Attempt":
        """Begin a shard, or go on where a process has died; `note` is what that process has left."""
        attempt = cls(task.shard, task.num_examples, task)
        if note is None or note.num_examples != task.num_examples:  # a note on other data
            return attempt
        attempt.is_alone, attempt.num_read = True, note.num_read
        attempt.ended, attempt.was_named = list(note.ended), note.was_named
        attempt.left_out = dict.fromkeys(note.left_out, _ALL_DIED)
        return attempt

    @property
    def culprit(self) -> int | None:
        """The example that the last two workers were reading by itself when they ended, if it was one."""
        example = self.ended[-1] if self.ended else None
        return example if self.ended[-2:] == [example, example] else None

    def begin_next(self) -> int | None:
        """Return the example that is to be read by itself now; None when all of the shard is to be captured."""
        self.num_read += self.reading is not None
        while self.num_read in self.left_out:
            self.num_read += 1
        self.reading = self.num_read if self.is_alone and self.num_read < self.num_examples else None
        return self.reading

    def note(self, *deaths: int | None) -> Note:
        """Return what is to be remembered of the shard, with one more death or with none."""
        return Note(
            shard=self.shard,
            num_examples=self.num_examples,
            ended=(*self.ended, *deaths),
            num_read=self.num_read,
            left_out=tuple(sorted(self.left_out)),
            was_named=self.was_named,
        )


class Attempts:
    """All shards of a capture: each is begun when it is asked for, and some are begun again."""

    def __init__(
        self,
        shards: Iterable[Attempt],
        limit: int,
        name: Callable[[int, int], str],
        *,
        skip_failed: bool = False,
        notes: Notes | None = None,
    ) -> None:
        """Take the shards, how many workers one of them may end, and what names an example of a shard.

        With `skip_failed`, an example that ends workers is left out. `notes` keeps what is to survive this process,
        where this process itself is the worker.
        """
        self._shards, self._limit, self._name = iter(shards), limit, name
        self._skip_failed, self._notes = skip_failed, notes
        self._again: deque[Attempt] = deque()
        self._has_begun_all = False

    def next(self, *, is_idle: bool) -> Attempt | None:
        """Return what a worker is to do next, if anything; one that is idle is given what is to be alone.

        Raises:
            TodiError: the last two processes that read an example of the shard have died there.
        """
        if is_idle and self._again:
            return self._again.popleft()
        attempt = next(self._shards, None)
        self._has_begun_all = attempt is None
        if attempt is not None and attempt.is_alone:
            self._go_on(attempt)
        return attempt

    @property
    def is_any_left(self) -> bool:
        """Whether a shard waits for a worker."""
        return bool(self._again) or not self._has_begun_all

    def begin(self, attempt: Attempt) -> int | None:
        """Return the example that is to be read by itself now; None when all of the shard is to be captured.

        Raises:
            CacheError: the note on this attempt cannot be written.
        """
        number = attempt.begin_next()
        if self._notes is not None:
            attempt.was_named = False
            self._notes.begin(attempt.note(number), attempt.note() if attempt.is_alone else None)
        return number

    def committed(self, attempt: Attempt) -> None:
        """Forget a shard that is committed.

        Raises:
            CacheError: the note on the attempt cannot be deleted.
        """
        if self._notes is not None:
            self._notes.end(attempt.shard)

    def died(self, attempt: Attempt, reason: str) -> None:
        """Note that the worker of a shard has ended, and plan the shard anew.

        Raises:
            TodiError: the shard has ended too many workers.
        """
        attempt.ended.append(attempt.reading)
        attempt.is_alone, attempt.reading = True, None
        if attempt.culprit is not None and self._skip_failed:
            _leave_out_culprit(attempt)
        elif len(attempt.ended) >= self._limit:
            raise self._accusation(attempt, reason)
        self._again.append(attempt)

    def _go_on(self, attempt: Attempt) -> None:
        """Draw the conclusions from the deaths of processes that have tried before; an example is named only once.

        Raises:
            TodiError: the last two of them died at the same example.
        """
        logger.warning(
            "an earlier run died at %s; that shard comes last, and its examples are first read one at a time",
            self._range(attempt),
        )
        if attempt.left_out and not self._skip_failed:  # they are wanted again
            attempt.num_read = min(attempt.left_out)
            attempt.left_out.clear()
        if attempt.ended[-1:] == [None]:  # not all that were survived may be innocent
            attempt.num_read = 0
        if self._notes is None:  # workers that can be replaced may try again
            attempt.ended.clear()
        elif attempt.culprit is not None and self._skip_failed:
            _leave_out_culprit(attempt)
        elif attempt.culprit is not None and attempt.was_named:  # the cause may be gone
            attempt.ended.pop()
        elif attempt.culprit is not None:
            attempt.was_named = True
            self._notes.keep(attempt.note())
            raise self._accusation(attempt, "the last two runs died there")

    def _accusation(self, attempt: Attempt, reason: str) -> TodiError:
        """Say what has ended workers: the example that two of them were reading by itself, or else the shard."""
        if attempt.culprit is None:
            who = f"{len(attempt.ended)} workers died at {self._range(attempt)}"
            return TodiError(f"{who}: {reason}; committed work is safe")
        named = self._name(attempt.shard, attempt.culprit)
        return TodiError(
            f"each worker that read example {named!r} of shard {attempt.shard} died: {reason}; committed work is "
            "safe. Leave the example out with --skip-failed, or remove it from the data"
        )

    def _range(self, attempt: Attempt) -> str:
        first, last = (self._name(attempt.shard, number) for number in (0, attempt.num_examples - 1))
        return f"shard {attempt.shard} (examples {first!r} to {last!r})"


def _leave_out_culprit(attempt: Attempt) -> None:
    """Go on behind the example that has ended workers."""
    culprit = attempt.culprit
    assert culprit is not None, "there is one"
    attempt.left_out[culprit] = _ALL_DIED
    attempt.num_read = culprit + 1
    attempt.ended.clear()
