"""A call in, its result out; or an error, once the call has shown no sign of life for some time.

An engine of several processes may wait for ever: for a process of its own that was killed, or for an answer that could
not be serialised. Python cannot end such a wait in its own thread. So one thread of its own makes all calls.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from todi_offline.errors import EngineError

T = TypeVar("T")

_LOOK_SECONDS = 1.0  # between two looks at the processes of an engine that is at work


class Watchdog:
    """Makes calls in a thread of its own, one after the other, and waits for each with patience that ends."""

    def __init__(self, name: str, patience_seconds: float, has_died: Callable[[], bool] = lambda: False) -> None:
        """Start the thread; `name` is that of the engine, for messages, and `has_died` says whether it has died."""
        self._name, self._patience_seconds, self._has_died = name, patience_seconds, has_died
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._alive_at = time.monotonic()
        self.is_stuck = False
        """Whether a call is still under way for which nobody waits any more; the thread makes no other."""
        threading.Thread(target=self._make_calls, name=f"{name} calls", daemon=True).start()

    def call(self, task: str, function: Callable[[], T]) -> T:
        """Return what the function returns; `task` says for people what the function does, such as `load the model`.

        Raises:
            EngineError: the engine has died, or the function neither returned nor called `is_alive` for the time that
                the watchdog waits.
        """
        if self.is_stuck:
            raise EngineError(f"{self._name} did not answer an earlier call, so it cannot {task}")
        future: Future[T] = Future()
        self._alive_at = time.monotonic()
        self._calls.put((future, function))
        try:
            return self._wait(future, task)
        finally:  # an interrupted wait leaves the call under way, too
            self.is_stuck = not future.done()

    def is_alive(self) -> None:
        """Note a sign of life of the call that is under way; the function itself calls this."""
        self._alive_at = time.monotonic()

    def close(self) -> None:
        """Let the thread end after the calls that it was given."""
        self._calls.put(None)

    def _wait(self, future: "Future[T]", task: str) -> T:
        while True:
            left = self._alive_at + self._patience_seconds - time.monotonic()
            try:
                return future.result(max(min(left, _LOOK_SECONDS), 0))
            except TimeoutError:
                if future.done():  # the function's own error, or its result of this very moment
                    return future.result()
                if self._has_died():
                    raise EngineError(died(self._name, task)) from None
                if time.monotonic() >= self._alive_at + self._patience_seconds:
                    raise EngineError(
                        f"{self._name} was asked to {task} and did not respond for {self._patience_seconds:g} s; "
                        "committed work is safe. Run the same command again; if the engine is only slow, raise "
                        "--engine-timeout"
                    ) from None

    def _make_calls(self) -> None:
        while (item := self._calls.get()) is not None:
            future, function = item
            try:
                future.set_result(function())
            except BaseException as error:  # whatever it is, the caller is to see it
                future.set_exception(error)


def died(name: str, task: str) -> str:
    """Return the message of an engine that has died, and what it was to do."""
    return (
        f"{name} died when asked to {task}; its log, if any, is above. Committed work is safe: run the same command "
        "again"
    )
