"""Work that an exception stops from inside."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import pytest

import todi_offline.capturing.in_process
from todi_offline.cache.progress import Progress


class StoppedError(Exception):
    """The work was to end here."""


def stop_at(call: int) -> Progress:
    """Return a progress that ends the work when it is called for the `call`-th time."""
    count = 0

    def progress(_done: int, _total: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise StoppedError

    return progress


@contextlib.contextmanager
def written_at_once() -> Iterator[None]:
    """Within, a capture commits a shard before its teacher reads the next, so a test knows what is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(todi_offline.capturing.in_process, "ThreadPoolExecutor", _Inline)
        yield


class _Inline:
    """In place of a pool of threads: does its work when it is submitted."""

    def __init__(self, _num_threads: int) -> None: ...

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future
