"""Shards and the deaths of their workers in, what to try next out.

A worker that dies leaves the shards that it had. Any of them may have killed it, or none. So each is tried again by a
worker that does nothing else, and that reads the examples of the shard one by one before it captures all of them. A
shard that ends too many workers ends the capture, by its name and by that of the example.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from todi_offline.errors import TodiError


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
    """Examples that a worker has read by themselves, and survived."""
    ended: list[int | None] = field(default_factory=list)
    """For each worker that ended, the example that it was reading by itself."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Examples that are not to be captured, each with the reason."""

    @property
    def culprit(self) -> int | None:
        """The example that the last two workers were reading by itself when they ended, if it was one."""
        example = self.ended[-1] if self.ended else None
        return example if self.ended[-2:] == [example, example] else None

    def begin_next(self) -> int | None:
        """Return the example that is to be read by itself now; None when all of the shard is to be captured."""
        self.num_read += self.reading is not None
        self.reading = self.num_read if self.is_alone and self.num_read < self.num_examples else None
        return self.reading


class Attempts:
    """All shards of a capture: each is begun when it is asked for, and some are begun again."""

    def __init__(
        self,
        shards: Iterable[Attempt],
        limit: int,
        name: Callable[[Attempt, int], str],
        *,
        skip_failed: bool = False,
    ) -> None:
        """Take the shards, how many workers one of them may end, and what names an example of a shard.

        With `skip_failed`, an example that ends workers is left out.
        """
        self._shards, self._limit, self._name, self._skip_failed = iter(shards), limit, name, skip_failed
        self._again: deque[Attempt] = deque()

    def next(self, *, is_idle: bool) -> Attempt | None:
        """Return what a worker is to do next, if anything; one that is idle is given what is to be alone."""
        if is_idle and self._again:
            return self._again.popleft()
        return next(self._shards, None)

    @property
    def is_any_left(self) -> bool:
        """Whether a shard waits for an idle worker."""
        return bool(self._again)

    def died(self, attempt: Attempt, reason: str) -> None:
        """Note that the worker of a shard has ended, and plan the shard anew.

        Raises:
            TodiError: the shard has ended too many workers.
        """
        attempt.ended.append(attempt.reading)
        attempt.is_alone, attempt.reading = True, None
        culprit = attempt.culprit
        if culprit is not None and self._skip_failed:
            attempt.left_out[culprit] = "each worker that read it has ended"
            attempt.num_read = culprit + 1
            attempt.ended.clear()
        elif len(attempt.ended) >= self._limit:
            raise TodiError(f"{self._accuse(attempt)}: {reason}; what is committed is safe")
        self._again.append(attempt)

    def _accuse(self, attempt: Attempt) -> str:
        """Say what has ended workers: the example that two of them were reading by itself, or else the shard."""
        if attempt.culprit is not None:
            named = self._name(attempt, attempt.culprit)
            return f"example {named!r} of shard {attempt.shard} has ended each worker that read it"
        first, last = self._name(attempt, 0), self._name(attempt, attempt.num_examples - 1)
        return f"shard {attempt.shard} (examples {first!r} to {last!r}) has ended {len(attempt.ended)} workers"
