"""A question in, one answer for all processes of a run out: that of the first, or the mean of theirs."""

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from todi_offline.errors import ModelError, first_line

T = TypeVar("T")


def of_first_rank(make: Callable[[], T], *, together: bool = False) -> T:
    """Return what the first process makes; another may hold no weights yet.

    With `together` all processes make it, and what the others made is dropped: for weights that are spread over them.

    Raises:
        ModelError: on the other processes, where `make` fails on the first; there its own error is raised.
    """
    state = PartialState()
    made: list[Any] = [None, None]
    failed: Exception | None = None
    if state.is_main_process or together:
        try:
            made[0] = make()
        except Exception as error:  # raised below, once the other processes wait no more
            failed = error
            made[1] = f"{type(error).__name__}: {first_line(error)}"
    if state.num_processes > 1:
        broadcast_object_list(made)
    if state.is_main_process and failed is not None:
        raise failed
    if made[1] is not None:
        raise ModelError(f"the first process of this run failed: {made[1]}")
    return made[0]  # type: ignore[no-any-return]


def is_first_rank() -> bool:
    """Return whether this is the first process of a run, which speaks for all."""
    return bool(PartialState().is_main_process)


def mean_over_ranks(value: float) -> float:
    """Return the mean of the values of all processes of a run."""
    return statistics.fmean(gather_object([value]))
