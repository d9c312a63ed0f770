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
    """Stops the work."""


def stop_at(call: int) -> Progress:
    """Return a progress callback that raises at its `call`-th call."""
    count = 0

    def progress(_done: int, _total: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise StoppedError

    return progress


@contextlib.contextmanager
def written_at_once() -> Iterator[None]:
    """In this context, a capture commits each shard before its teacher reads the next one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(todi_offline.capturing.in_process, "ThreadPoolExecutor", _Inline)
        yield


class _Inline:
    """Replaces a thread pool: runs each call at submission."""

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
