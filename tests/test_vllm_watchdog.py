"""Calls of an engine that may hang: results, errors and time limits."""

import threading
import time

import pytest

from todi_offline.errors import EngineError
from todi_offline.teacher.in_vllm.watchdog import Watchdog


def test_a_call_returns_the_functions_value_from_another_thread() -> None:
    watchdog = Watchdog("the engine", 10.0)
    threads = {watchdog.call("work", threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    watchdog.close()


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("its own"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_function_is_raised_and_the_next_call_works(error: BaseException) -> None:
    def fail() -> None:
        raise error

    watchdog = Watchdog("the engine", 10.0)
    with pytest.raises(type(error)) as caught:
        watchdog.call("work", fail)
    assert caught.value is error
    assert watchdog.call("work", lambda: 1) == 1
    watchdog.close()


def test_a_call_without_a_sign_of_life_ends_and_no_other_is_made() -> None:
    released = threading.Event()
    watchdog = Watchdog("the engine", 0.05)
    with pytest.raises(EngineError, match=r"asked to work and did not respond for 0\.05 s.*--engine-timeout"):
        watchdog.call("work", released.wait)
    assert watchdog.is_stuck
    with pytest.raises(EngineError, match="so it cannot rest"):
        watchdog.call("rest", lambda: None)
    released.set()
    watchdog.close()


def test_an_engine_that_has_died_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("todi_offline.teacher.in_vllm.watchdog._LOOK_SECONDS", 0.01)
    released, looks = threading.Event(), iter([False, False, True])
    watchdog = Watchdog("the engine", 30.0, lambda: next(looks))
    with pytest.raises(EngineError, match="the engine died when asked to work"):
        watchdog.call("work", released.wait)
    assert watchdog.is_stuck
    released.set()
    watchdog.close()


def test_a_wait_that_is_interrupted_leaves_the_watchdog_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    released = threading.Event()
    watchdog = Watchdog("the engine", 10.0)
    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watchdog.call("work", released.wait)
    assert watchdog.is_stuck
    released.set()
    watchdog.close()


def test_signs_of_life_keep_a_call_going_beyond_the_patience() -> None:
    watchdog = Watchdog("the engine", 0.2)
    started = time.monotonic()

    def work() -> int:
        signs, waited = 0, threading.Event()
        while time.monotonic() - started < 0.5:
            watchdog.is_alive()
            signs += not waited.wait(0.01)
        return signs

    assert watchdog.call("work", work) > 5
    watchdog.close()
