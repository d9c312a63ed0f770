"""The processes that an engine has started in, their end out, where the engine itself does not answer."""

import contextlib
from typing import Any


class StartedProcesses:
    """Processes below this one that were started between two moments."""

    def __init__(self) -> None:
        """Take the first moment."""
        self._before = set(_children())
        self._started: list[Any] = []

    def note(self) -> None:
        """Take the second moment."""
        self._started = [process for process in _children() if process not in self._before]

    def kill(self) -> None:
        """End these processes, and those that they have started since."""
        import psutil

        for process in self._started:
            with contextlib.suppress(psutil.Error):
                for each in (process, *process.children(recursive=True)):
                    each.kill()
        psutil.wait_procs(self._started, timeout=10)


def _children() -> list[Any]:
    import psutil  # which vLLM brings

    return psutil.Process().children(recursive=True)  # type: ignore[no-any-return]
