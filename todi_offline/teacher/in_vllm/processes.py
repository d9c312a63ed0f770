"""The processes that an engine has started in, whether they live and their end out: where the engine does not say."""

import contextlib
import threading
from typing import Any


class StartedProcesses:
    """Processes below this one that were started between two moments."""

    def __init__(self) -> None:
        """Take the first moment."""
        self._before = set(_children())
        self._started: list[Any] = []
        self._may_end = False

    def note(self) -> None:
        """Take the second moment."""
        self._started = [process for process in _children() if process not in self._before]

    def has_one_ended(self) -> bool:
        """Whether one of these processes has ended, though none may."""
        return not self._may_end and not all(map(_lives, self._started))

    def forget_ends(self) -> None:
        """Let the processes end from now on."""
        self._may_end = True

    def kill(self) -> None:
        """End these processes, and those that they have started since."""
        import psutil

        for process in self._started:
            with contextlib.suppress(psutil.Error):
                for each in (process, *process.children(recursive=True)):
                    each.kill()
        psutil.wait_procs(self._started, timeout=10)


def end_with(pid: int) -> None:
    """End this process, and those between it and the process `pid` above it, when that process ends.

    Killed, a driver ends nothing: an engine that outlives it would hold its devices for ever. Where that process is
    this one, or not above it (as on another machine), nothing is done.
    """
    import psutil

    here = psutil.Process()
    line = [here, *here.parents()]
    above = next((number for number, process in enumerate(line) if process.pid == pid), 0)
    if above:
        threading.Thread(target=_end_after, args=(line[above], line[:above]), daemon=True).start()


def _end_after(awaited: Any, processes: list[Any]) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        awaited.wait()
    for process in reversed(processes):  # this one is the last
        with contextlib.suppress(psutil.Error):
            process.kill()


def _lives(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _children() -> list[Any]:
    import psutil  # which vLLM brings

    return psutil.Process().children(recursive=True)  # type: ignore[no-any-return]
