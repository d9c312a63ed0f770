"""Programs that a test starts: each ends with its test, and each wait has a limit."""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 240.0
TESTS = Path(__file__).parent.parent
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """The output and the exit code of a program."""

    code: int
    output: str
    errors: str

    @property
    def error_lines(self) -> list[str]:
        """The error lines of this library, without those of other libraries."""
        return [line for line in self.errors.splitlines() if line.startswith("Error:")]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment for a program that imports this checkout, with one thread and no network."""
    paths = (str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")]))
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | fixed | changes


@contextlib.contextmanager
def started(words: Sequence[str], **changes: str) -> Iterator["subprocess.Popen[str]"]:
    """Yield a program that runs in a session of its own; all of its processes end with the context."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(words: Sequence[str], seconds: float = PATIENCE_SECONDS, **changes: str) -> Ended:
    """Run a program to its end.

    Raises:
        subprocess.TimeoutExpired: it takes longer than `seconds`.
    """
    with started(words, **changes) as process:
        output, errors = process.communicate(timeout=seconds)
        return Ended(process.returncode, output, errors)


class Answering:
    """A program of `support` that answers each line of JSON with another."""

    def __init__(self, module: str, config: dict[str, Any], log: Path) -> None:
        """Start the program; its stderr goes to a file."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"support.{module}", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,
            )

    def ask(self, question: dict[str, Any], seconds: float = PATIENCE_SECONDS) -> Any:
        """Return the answer to a question; raise TimeoutError if it takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"no answer to {question} within {seconds} s; it said {self._log.read_text()}")
        line = self._process.stdout.readline()
        assert line, f"the program has ended: {self._log.read_text()}"
        return json.loads(line)

    def close(self) -> None:
        """End the program."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def end_with_parent() -> None:
    """On Linux, let the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
