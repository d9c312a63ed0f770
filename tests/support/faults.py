"""Runs a capture many times, each in its own process with one fault.

Importing torch takes longer than the capture, so this is a program that imports everything, and forks for each run:

    python -m support.faults '{"teacher": ..., "data": ..., "settings": {...}}' < runs > outcomes

A run is a line of JSON, {"out": folder, "fault": name, "at": instant}; an outcome is {"code": ..., "error": ...,
"operations": ..., "seconds": ...}, the last two of undisturbed runs. An instant is the number of an operation of the
disk or, between 0 and 1 and for `kill` alone, a share of the seconds that an undisturbed run takes.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import datasets  # noqa: F401 -- once, not in every child
import torch
import zarr  # noqa: F401

import todi_offline.capturing.coordinator
import todi_offline.capturing.engines
import todi_offline.capturing.loading
from support.disk import Operation, Watch
from todi_offline.commands.cli import main
from todi_offline.data import DataConfig, load_examples
from todi_offline.teacher.in_transformers import TeacherConfig

Run = dict[str, Any]


def outcome(run: Run, config: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Fork, carry out the run in the child, and return its outcome."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as measured:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 70
            try:
                code = capture(run, config, seconds, measured)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        measured.seek(0)
        return {"code": code, "error": said.read(), **json.loads(measured.read() or "{}")}


def capture(run: Run, config: dict[str, Any], seconds: float, measured: Any) -> int:
    """Run `todi capture` in this process; return its exit code."""
    fault, at = run.get("fault"), run.get("at", -1)
    count = 0

    def before(asked: Operation) -> None:
        nonlocal count
        count += 1
        if fault not in (None, "teacher") and count == at:
            happen(fault, asked, Path(run["out"]))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup, or & in a shell, may have changed the handlers
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if fault == "kill" and at < 1:
        threading.Timer(at * seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    started = perf_counter()
    with Watch(Path(run["out"]), before), failing_teacher(at if fault == "teacher" else -1):
        code = todi(["capture", "--json", "--out", run["out"], *options(config)])
    json.dump({"operations": count, "seconds": perf_counter() - started}, measured)
    measured.flush()
    return code


def options(config: dict[str, Any]) -> list[str]:
    named = {"teacher": config["teacher"], "data": config["data"], **config["settings"]}
    return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def todi(words: list[str]) -> int:
    """Run `todi` as a shell would; return its exit code."""
    with mock.patch.object(sys, "argv", ["todi", *words]):
        try:
            main()
        except SystemExit as ending:
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
                return 1
            return ending.code or 0
    return 0


def load_once(config: dict[str, Any]) -> None:
    """Load teacher and data set for all later runs, and capture once, because a first capture is slow."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.fsync = lambda _: None  # unsynced data survive the death of a process
    teacher = todi_offline.capturing.loading.load_teacher(TeacherConfig(teacher=config["teacher"], device="cpu"))
    lengths = {name: value for name, value in config["settings"].items() if name.startswith("max_")}
    examples = load_examples(DataConfig(data=config["data"], **lengths), teacher.tokenizer)
    mock.patch.object(todi_offline.capturing.loading, "load_teacher", return_value=teacher).start()
    mock.patch.object(todi_offline.capturing.coordinator, "load_examples", return_value=examples).start()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        todi(["capture", "--json", "--out", folder, *options(config)])


def happen(fault: str, asked: Operation, root: Path) -> None:
    """Make a fault happen just before an operation of the disk."""
    if fault == "kill":
        if asked.kind == "write":  # half of it is written
            (root / asked.path).write_bytes(asked.data[: len(asked.data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "memory":
        raise MemoryError
    else:
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))


def failing_teacher(at: int) -> Any:
    """Return a patch with which the teacher runs out of memory at its n-th batch."""
    real: Callable[..., Any] = todi_offline.capturing.engines.queue_targets
    count = 0

    def queue_targets(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return real(*args)

    return mock.patch.object(todi_offline.capturing.engines, "queue_targets", queue_targets)


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    load_once(config)
    seconds = 0.0
    for line in sys.stdin:
        found = outcome(json.loads(line), config, seconds)
        seconds = seconds or found.get("seconds", 0.0)
        print(json.dumps(found), flush=True)
