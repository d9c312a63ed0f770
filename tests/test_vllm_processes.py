"""Only processes that were started between two moments are ended."""

import subprocess
import sys

import psutil

from todi_offline.vllm_teacher.processes import StartedProcesses

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


def waiting(code: str = WAIT) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    with process:
        process.kill()


def test_only_processes_that_were_started_in_between_are_ended_with_those_below_them() -> None:
    parent = f"import subprocess, sys; below = subprocess.Popen([sys.executable, '-c', {WAIT!r}]); sys.stdin.read()"
    before = waiting()
    started = StartedProcesses()
    within = waiting(parent)
    (below,) = psutil.Process(within.pid).children()
    started.note()
    after = waiting()
    started.kill()
    within.wait(10)
    assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
    assert before.poll() is None
    assert after.poll() is None
    for process in (before, within, after):
        end(process)


def test_processes_that_have_ended_already_are_no_error() -> None:
    started = StartedProcesses()
    process = waiting()
    started.note()
    assert not started.has_one_ended()
    end(process)
    assert started.has_one_ended()
    started.forget_ends()
    assert not started.has_one_ended()
    started.kill()
    assert process.returncode == -9
