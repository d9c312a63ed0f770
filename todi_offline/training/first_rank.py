"""A question in, the answer of the first of a run's processes out, on all of them: for no two may decide otherwise."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

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
