"""Shards whose workers died: they are retried one by one, and named after too many deaths."""

from collections.abc import Iterator

import pytest

from todi_offline.cache.format.notes import Note
from todi_offline.capturing.attempts import Attempt, Attempts
from todi_offline.capturing.notes import Notes
from todi_offline.capturing.work import ShardTask
from todi_offline.errors import TodiError


def attempts_of(num_shards: int, limit: int = 3, num_examples: int = 3) -> Attempts:
    shards = (Attempt(shard, num_examples, task=None) for shard in range(num_shards))
    return Attempts(shards, limit, lambda shard, number: f"{shard}/{number}")


def steps(attempt: Attempt) -> Iterator[int | None]:
    """What its worker does: the examples that it reads by themselves, then None for the whole shard."""
    while (number := attempt.begin_next()) is not None:
        yield number
    yield None


def test_a_shard_is_captured_as_a_whole_and_after_a_death_example_by_example_first() -> None:
    attempts = attempts_of(1)
    attempt = attempts.next(is_idle=True)
    assert attempt is not None
    assert list(steps(attempt)) == [None]
    attempts.died(attempt, "killed")
    assert attempts.is_any_left
    assert attempts.next(is_idle=False) is None  # it wants a worker of its own
    assert attempts.next(is_idle=True) is attempt
    assert list(steps(attempt)) == [0, 1, 2, None]
    assert not attempts.is_any_left


def test_examples_read_before_a_death_are_not_read_again() -> None:
    attempts = attempts_of(1, limit=5)
    attempt = attempts.next(is_idle=True)
    assert attempt is not None
    attempts.died(attempt, "killed")
    assert [attempt.begin_next() for _ in range(2)] == [0, 1]
    attempts.died(attempt, "killed")
    assert list(steps(attempt)) == [1, 2, None]


def test_an_example_that_ends_two_workers_by_itself_is_named() -> None:
    attempts = attempts_of(2)
    attempt = attempts.next(is_idle=True)
    assert attempt is not None
    attempts.died(attempt, "killed")
    assert [attempt.begin_next() for _ in range(2)] == [0, 1]
    attempts.died(attempt, "killed")
    assert attempt.begin_next() == 1
    with pytest.raises(TodiError, match=r"^each worker that read example '0/1' of shard 0 died: no memory; committed"):
        attempts.died(attempt, "no memory")


def test_a_shard_whose_examples_are_innocent_by_themselves_is_named_as_a_whole() -> None:
    attempts = attempts_of(1, limit=2)
    attempt = attempts.next(is_idle=True)
    assert attempt is not None
    attempts.died(attempt, "killed")
    assert list(steps(attempt))[-1] is None
    with pytest.raises(
        TodiError, match=r"^2 workers died at shard 0 \(examples '0/0' to '0/2'\): killed; committed work is"
    ):
        attempts.died(attempt, "killed")


def test_an_example_that_ends_workers_is_left_out_and_the_rest_is_captured() -> None:
    shards = [Attempt(0, 4, task=None)]
    attempts = Attempts(shards, 3, lambda *_: "", skip_failed=True)
    (attempt,) = shards
    assert attempts.next(is_idle=True) is attempt
    attempts.died(attempt, "killed")
    for culprit in (1, 2):
        for _ in range(2):
            assert next(number for number in steps(attempt) if number == culprit) == culprit
            attempts.died(attempt, "killed")
    assert list(steps(attempt)) == [3, None]
    assert list(attempt.left_out) == [1, 2]


def test_shards_are_begun_when_they_are_asked_for() -> None:
    begun = []

    def shards() -> Iterator[Attempt]:
        for shard in range(5):
            begun.append(shard)
            yield Attempt(shard, 1, task=None)

    attempts = Attempts(shards(), 3, lambda *_: "")
    attempts.next(is_idle=True)
    attempts.next(is_idle=False)
    assert begun == [0, 1]


# A process that is a worker itself: each of its deaths is followed by another run.


class Runs:
    """Runs that capture one shard in a process of their own, and die at some of its examples."""

    def __init__(self, num_examples: int = 5) -> None:
        self.num_examples = num_examples
        self.note: Note | None = None
        self.seen: list[int | None] = []

    def write_note(self, note: Note) -> None:
        self.note = Note.from_bytes(note.to_bytes(), 0, "")

    def delete_note(self, _: int) -> None:
        self.note = None

    def run(self, *deadly: int | None, skip_failed: bool = False) -> str:
        """Return how a run ends: `done`, `dead`, or what its error says. None is deadly to the whole shard."""
        self.seen = []
        notes = Notes(self)  # type: ignore[arg-type]
        task = ShardTask(0, b"", self.num_examples)
        shards = [Attempt.of(task, self.note)]
        attempts = Attempts(shards, 3, lambda _, number: f"e{number}", skip_failed=skip_failed, notes=notes)
        try:
            attempt = attempts.next(is_idle=True)
        except TodiError as error:
            return str(error)
        assert attempt is not None
        while (number := attempts.begin(attempt)) is not None:
            self.seen.append(number)
            if number in deadly:
                return "dead"
        whole = set(range(self.num_examples)) - set(attempt.left_out)
        if None in deadly or whole & set(deadly):
            return "dead"
        attempts.committed(attempt)
        self.left_out = attempt.left_out
        return "done"


def test_a_run_without_a_death_leaves_no_note_and_reads_no_example_by_itself() -> None:
    runs = Runs()
    assert (runs.run(), runs.seen, runs.note) == ("done", [], None)


def test_the_run_after_a_death_reads_each_example_by_itself() -> None:
    runs = Runs()
    assert runs.run(None) == "dead"
    assert (runs.run(), runs.seen, runs.note) == ("done", [0, 1, 2, 3, 4], None)


def test_the_fourth_run_names_the_example_and_the_fifth_tries_it_again() -> None:
    runs = Runs()
    assert [runs.run(2) for _ in range(3)] == ["dead"] * 3
    assert runs.seen == [2]  # those before it were survived
    named = "each worker that read example 'e2' of shard 0 died: the last two runs died there; committed work"
    assert runs.run(2).startswith(named)
    assert runs.run(2) == "dead"
    assert runs.run(2).startswith(named)
    assert runs.run() == "done"


def test_a_named_example_is_left_out_at_once_by_a_run_that_may() -> None:
    runs = Runs()
    for _ in range(4):
        runs.run(2)
    assert runs.run(2, skip_failed=True) == "done"
    assert list(runs.left_out) == [2]


def test_several_examples_are_left_out_and_are_wanted_again_without_skip_failed() -> None:
    runs = Runs()
    assert [runs.run(1, 2, 4, skip_failed=True) for _ in range(7)] == ["dead"] * 7
    assert runs.run(None, 1, 2, 4, skip_failed=True) == "dead"  # at the whole
    assert runs.run(1, 2, 4) == "dead"
    assert runs.seen == [0, 1]
    assert [runs.run(1, 2, 4, skip_failed=True) for _ in range(6)] == ["dead"] * 5 + ["done"]
    assert list(runs.left_out) == [1, 2, 4]


def test_a_shard_that_kills_only_as_a_whole_is_tried_by_every_run() -> None:
    runs = Runs()
    assert {runs.run(None) for _ in range(30)} == {"dead"}
    assert runs.seen == [0, 1, 2, 3, 4]
    assert runs.run() == "done"


def test_a_note_on_other_data_is_not_followed() -> None:
    runs = Runs()
    runs.note = Note(shard=0, num_examples=9, ended=(7, 7))
    assert (runs.run(), runs.seen) == ("done", [])


def test_workers_that_can_be_replaced_try_again_what_has_ended_processes() -> None:
    note = Note(shard=0, num_examples=5, ended=(None, 2, 2), num_read=2, left_out=(0,))
    shards = [Attempt.of(ShardTask(0, b"", 5), note)]
    attempts = Attempts(shards, 3, lambda *_: "e", skip_failed=True)
    attempt = attempts.next(is_idle=True)
    assert attempt is shards[0]
    assert list(steps(attempt)) == [2, 3, 4, None]
    assert list(attempt.left_out) == [0]
