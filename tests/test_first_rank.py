"""A value that the first process makes reaches all processes; if it fails, no process waits."""

from types import SimpleNamespace
from typing import Any

import pytest

from todi_offline.errors import ModelError
from todi_offline.training import first_rank
from todi_offline.training.first_rank import of_first_rank


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, sent: list[Any]) -> None:
    """Be one of two processes, between which `sent` travels."""

    def broadcast(values: list[Any]) -> None:
        if rank == 0:
            sent[:] = values
        values[:] = sent

    state = SimpleNamespace(is_main_process=rank == 0, num_processes=2)
    monkeypatch.setattr(first_rank, "PartialState", lambda: state)
    monkeypatch.setattr(first_rank, "broadcast_object_list", broadcast)


def refuse() -> int:
    raise RuntimeError("no weights here")


def test_one_process_makes_its_own() -> None:
    assert of_first_rank(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="no weights here"):
        of_first_rank(refuse)


@pytest.mark.parametrize("together", [False, True])
def test_the_other_processes_receive_the_first_ones_value(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    as_rank(monkeypatch, 0, sent)
    assert of_first_rank(lambda: 7, together=together) == 7
    as_rank(monkeypatch, 1, sent)
    assert of_first_rank(refuse, together=together) == 7


def test_an_error_of_the_first_process_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    as_rank(monkeypatch, 0, sent)
    with pytest.raises(RuntimeError, match="no weights here"):
        of_first_rank(refuse)
    as_rank(monkeypatch, 1, sent)
    with pytest.raises(ModelError, match="the first process of this run failed: RuntimeError: no weights here"):
        of_first_rank(lambda: 7)
