"""Runs `todi capture` in ranks many times, each in new processes, with faults.

Importing torch takes longer than a small capture, so this is a program that imports everything, and forks the ranks of
each run as torchrun starts them:

    python -m support.rank_runs '{"teacher": ..., "data": ..., "settings": {...}}' < runs > outcomes

A run is a line of JSON:

    out       where the cache is written
    size      the number of ranks
    words     additional words of the command line
    signals   [[rank, seconds, name], ...]: each is sent to the rank this many seconds after the start
    poison    {"id": example, "how": "raise", "kill", "preempt" or "stall"}: the fault of the teacher at an example;
              preempt: its process gets SIGTERM there
    odd       {"rank": number, "what": "data", "teacher", "versions" or "broken"}: how one rank differs from the others
    lease     seconds: ranks cannot tell whether the holder of a lock is dead, and wait for a lease of this length
    environ   additional environment variables
    loads     whether each rank loads the teacher itself
    restarts  the `signals` of each attempt but the last; the attempts share a store, as under torchrun

An outcome, of the last attempt, is {"codes": [...], "errors": [...], "output": ..., "seconds": ..., "were_ended": ...,
"are_stuck": ...}. When a rank fails, torchrun ends the remaining ranks. This program waits some seconds first, in which
they should end by themselves; `were_ended` is true if they did not.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets  # noqa: F401 -- once, not in every rank
import fsspec
import torch
import torch.distributed
import zarr  # noqa: F401

import todi_offline.capturing.coordinator
import todi_offline.capturing.engines
import todi_offline.capturing.loading
from support.faults import options, todi
from support.programs import end_with_parent
from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from todi_offline.cache.store.locks import Holder
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.data import DataConfig, Examples, load_examples
from todi_offline.errors import ModelError
from todi_offline.teacher.in_transformers import TeacherConfig, as_teacher, load_teacher

GRACE_SECONDS = 5.0
"""The time that the other ranks get to end by themselves after the first failure."""
LIMIT_SECONDS = 90.0
"""Ranks that take longer count as stuck and are killed."""

Run = dict[str, Any]


def outcome(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """Run all attempts of a job, as torchrun restarts it; return the outcome of the last attempt."""
    restarts = run.get("restarts", [])
    shared: Any = None
    if restarts:
        shared = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free_port() if shared is None else shared.port
    for attempt, signals in enumerate([*restarts, run.get("signals", [])]):
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(run["size"])}
        if shared is not None:
            environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        found = job(run, config, environ, signals)
    return found


def job(run: Run, config: dict[str, Any], environ: dict[str, str], signals: list[Any]) -> dict[str, Any]:
    """Fork the ranks of one attempt, send them their signals, and wait for all of them up to a limit."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * run["size"])]
        outputs, errors = files[::2], files[1::2]
        started = time.monotonic()
        ranks = {
            rank: fork(run, config, environ, rank, outputs[rank].fileno(), errors[rank].fileno())
            for rank in range(run["size"])
        }
        due = sorted((started + seconds, rank, name) for rank, seconds, name in signals)
        codes: dict[int, int] = {}
        deadline, were_ended = float("inf"), False
        while ranks and time.monotonic() < started + LIMIT_SECONDS:
            if time.monotonic() > deadline:
                due, deadline, were_ended = [(0.0, rank, "SIGTERM") for rank in ranks], float("inf"), True
            while due and due[0][0] <= time.monotonic():
                _, rank, name = due.pop(0)
                if rank in ranks:
                    os.kill(ranks[rank], getattr(signal, name))
            reap(ranks, codes, os.WNOHANG)
            if any(codes.values()) and not were_ended:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.005)
        are_stuck = bool(ranks)
        for process in ranks.values():
            os.kill(process, signal.SIGKILL)
        reap(ranks, codes, 0)
        for file in files:
            file.seek(0)
        return {
            "codes": [codes[rank] for rank in range(run["size"])],
            "errors": [file.read() for file in errors],
            "output": outputs[0].read(),
            "seconds": time.monotonic() - started,
            "were_ended": were_ended,
            "are_stuck": are_stuck,
        }


def reap(ranks: dict[int, int], codes: dict[int, int], options: int) -> None:
    """Remove the ranks that have ended from `ranks`, and record their exit codes."""
    for rank, process in list(ranks.items()):
        ended, status = os.waitpid(process, options)
        if ended:
            del ranks[rank]
            codes[rank] = os.waitstatus_to_exitcode(status)


def fork(run: Run, config: dict[str, Any], environ: dict[str, str], rank: int, output: int, errors: int) -> int:
    """Start a rank and return its process, which ends when this process ends."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        end_with_parent()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        if run["size"] > 1:
            os.environ |= environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if run.get("loads"):
            mock.patch.object(todi_offline.capturing.loading, "load_teacher", load_teacher).start()
        os.environ |= run.get("environ", {})
        fsspec.config.set_conf_env(fsspec.config.conf)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with poisoned(run.get("poison")), odd(run.get("odd", {}), rank), leased(run.get("lease")):
            words = ["--json", "--out", run["out"], *options(config), *run.get("words", [])]
            code = todi(["capture", *words])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def poisoned(poison: dict[str, str] | None) -> Iterator[None]:
    """Within this context, the teacher fails at an example, or ends its process."""
    if poison is None:
        yield
        return
    real = todi_offline.capturing.engines.queue_targets

    def queue_targets(teacher: Any, examples: Any, settings: Any) -> Any:
        if any(example.id == poison["id"] for example in examples):
            if poison["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if poison["how"] == "preempt":
                os.kill(os.getpid(), signal.SIGTERM)
            while poison["how"] in ("preempt", "stall"):
                signal.pause()
            raise RuntimeError("no kernel for this")
        return real(teacher, examples, settings)

    with mock.patch.object(todi_offline.capturing.engines, "queue_targets", queue_targets):
        yield


@contextlib.contextmanager
def leased(seconds: float | None) -> Iterator[None]:
    """Within this context, no process can tell whether another one lives, as if each had a machine of its own."""
    if seconds is None:
        yield
        return
    defaults = RemoteStore.__init__.__defaults__
    assert defaults is not None
    with (
        mock.patch.object(RemoteStore.__init__, "__defaults__", (*defaults[:-1], seconds)),
        mock.patch.object(Holder, "is_dead", return_value=False),
    ):
        yield


@contextlib.contextmanager
def odd(oddity: dict[str, Any], rank: int) -> Iterator[None]:
    """Within this context, a rank differs from the others."""
    what = oddity.get("what") if oddity.get("rank") == rank else None
    with contextlib.ExitStack() as stack:
        if what == "data":
            examples: Examples = todi_offline.capturing.coordinator.load_examples()
            fewer = Examples.from_list(list(examples)[:-1], examples.recipe)
            patch = mock.patch.object(todi_offline.capturing.coordinator, "load_examples", return_value=fewer)
            stack.enter_context(patch)
        elif what == "teacher":
            other = as_teacher(llama(seed=1, num_hidden_layers=1), tiny_tokenizer())
            patch = mock.patch.object(todi_offline.capturing.loading, "load_teacher", return_value=other)
            stack.enter_context(patch)
        elif what == "versions":
            patch = mock.patch.object(todi_offline.capturing.engines, "version", return_value="0.1")
            stack.enter_context(patch)
        elif what == "broken":
            error = ModelError("the weights cannot be read; fetch them again")
            patch = mock.patch.object(todi_offline.capturing.loading, "load_teacher", side_effect=error)
            stack.enter_context(patch)
        yield


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def load_once(config: dict[str, Any]) -> None:
    """Load teacher and data set for all later runs, and capture once, because a first capture is slow."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.fsync = lambda _: None  # unsynced data survive the death of a process
    teacher = load_teacher(TeacherConfig(teacher=config["teacher"], device="cpu"))
    lengths = {name: value for name, value in config["settings"].items() if name.startswith("max_")}
    examples = load_examples(DataConfig(data=config["data"], **lengths), teacher.tokenizer)
    mock.patch.object(todi_offline.capturing.loading, "load_teacher", return_value=teacher).start()
    mock.patch.object(todi_offline.capturing.coordinator, "load_examples", return_value=examples).start()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        todi(["capture", "--json", "--out", str(Path(folder) / "cache"), *options(config)])


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    load_once(config)
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line), config)), flush=True)
