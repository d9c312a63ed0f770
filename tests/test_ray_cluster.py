"""Ray itself, in processes of its own: a capture survives kills of its actors and its driver with the same bytes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import Row
from support.captures import Setting, records_of, sums_in_bucket, sums_of
from support.object_store import endpoint_of, s3_bucket
from support.poison import save_poisonous
from support.programs import run, started

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, conversations: list[Row]) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"), conversations[:120])


def descendants(process: int) -> dict[int, str]:
    """The processes below a process, and their names."""
    found: dict[int, str] = {}
    with contextlib.suppress(psutil.Error):
        for below in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[below.pid] = " ".join(below.cmdline())
    return found


def command_of(setting: Setting, out: Path | str, *more: str, **changes: Any) -> list[str]:
    return [sys.executable, "-m", "todi_offline", *setting.words(out, *more, **changes)]


def actors_of(driver: int) -> list[int]:
    return sorted(number for number, words in descendants(driver).items() if words.startswith("ray::CaptureActor"))


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float = 100) -> Any:
    """Return what a condition becomes while a process runs; None when that ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    raise TimeoutError(f"nothing within {seconds} s")


@contextlib.contextmanager
def driving(words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Yield a driver; whatever it has started ends with the context, too, Ray's own processes included."""
    with started(words) as process:
        below: dict[int, str] = {}
        try:
            yield process
        finally:
            below |= descendants(process.pid)
            for number in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def test_a_killed_actor_of_ray_is_replaced_and_the_bytes_are_the_same(setting: Setting, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with driving(command_of(setting, root, ray_actors=2)) as process:
        wait_for(lambda: (root / "cache.json").exists() and actors_of(process.pid), process)
        victims = wait_for(lambda: len(records_of(root)) >= 1 and actors_of(process.pid), process)
        if victims:  # else it was done before
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[0], signal.SIGKILL)
        output, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
    assert sums_of(root) == setting.whole
    assert sum(work["num_shards"] for work in json.loads(output)["workers"].values()) == len(records_of(root))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_a_driver_or_its_actors_are_killed_at_any_instant(setting: Setting, tmp_path: Path, number: int) -> None:
    rng, root = np.random.default_rng(number), tmp_path / "cache"
    with driving(command_of(setting, root, ray_actors=2)) as process:
        wait_for(lambda: len(actors_of(process.pid)) == 2, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=float(rng.random()) * 15)
        victims = [process.pid] if number % 2 else actors_of(process.pid)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=150)
    changes: dict[str, Any] = {} if number % 3 else {"ray_actors": 1}  # goes on as one process, or with fewer actors
    done = run(command_of(setting, root, **changes), seconds=200)
    assert done.code == 0, done.errors
    assert sums_of(root) == setting.whole


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_ray_names_an_example_that_its_teacher_does_not_survive(
    setting: Setting, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher, data = save_poisonous(tmp_path, setting.rows, 70, how)
    words = command_of(setting, tmp_path / "cache", "--trust-remote-code", teacher=teacher, data=data, ray_actors=2)
    done = run(words, seconds=250)
    assert done.code == 1
    (line,) = done.error_lines
    assert "example 'chats.jsonl:70' of shard " in line
    assert records_of(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["pending"]


@pytest.mark.slow
def test_actors_of_ray_write_straight_to_an_object_store(setting: Setting) -> None:
    with s3_bucket() as proxy:
        done = run(command_of(setting, "s3://bucket/cache", ray_actors=2), **endpoint_of(proxy))
        assert done.code == 0, done.errors
        assert len(json.loads(done.output)["workers"]) >= 1
        assert sums_in_bucket("s3://bucket/cache") == setting.whole
