"""Only processes that were started between two moments are ended."""

import os
import subprocess
import sys
import threading

import psutil

from todi_offline.teacher.in_vllm.processes import StartedProcesses, end_with

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


def test_a_process_and_its_parent_end_with_the_driver_above_them() -> None:
    """The driver starts the engine, which starts the worker; then the driver is killed."""
    worker = "import os, sys; from todi_offline.teacher.in_vllm.processes import end_with; end_with(int(sys.argv[1]));"
    worker += "print(os.getpid(), os.getppid(), flush=True); sys.stdin.read()"
    engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}, sys.argv[1]])"
    driver = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {engine!r}, str(os.getpid())])"
    process = subprocess.Popen([sys.executable, "-c", driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    below = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(below) == 2
    end(process)
    gone, alive = psutil.wait_procs(below, timeout=20)
    assert (len(gone), alive) == (2, [])


def test_a_worker_in_the_drivers_own_process_or_elsewhere_waits_for_nothing() -> None:
    before = threading.active_count()
    end_with(os.getpid())
    end_with(2**22 + 1)  # no process has this id
    assert threading.active_count() == before
