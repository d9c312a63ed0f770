"""Shards whose workers died: they are retried one by one, and named after too many deaths."""

from collections.abc import Iterator

import pytest

from todi_offline.capturing.attempts import Attempt, Attempts
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
    with pytest.raises(
        TodiError, match=r"^example '0/1' of shard 0 has ended each worker that read it: no memory; what"
    ):
        attempts.died(attempt, "no memory")


def test_a_shard_whose_examples_are_innocent_by_themselves_is_named_as_a_whole() -> None:
    attempts = attempts_of(1, limit=2)
    attempt = attempts.next(is_idle=True)
    assert attempt is not None
    attempts.died(attempt, "killed")
    assert list(steps(attempt))[-1] is None
    with pytest.raises(TodiError, match=r"^shard 0 \(examples '0/0' to '0/2'\) has ended 2 workers: killed; what is"):
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
