"""Everything that this library raises on purpose.

    TodiError
    ├── ConfigError              a setting that is unknown, out of range or contradicts another
    ├── DataError                a data set that cannot be read as examples
    ├── ModelError               a model, tokenizer or adapter that cannot be loaded or does not fit
    │   └── TeacherOutputError   NaN or +inf among the teacher's logits
    ├── EngineError              a serving engine that has failed, does not answer, or is not one known here
    ├── TargetsError             targets asked for in a form that they do not have
    ├── DivergedError            a run whose loss is no finite number any more
    ├── OutOfMemoryError         the machine or a device has no memory left
    └── CacheError               a cache that cannot be used
        ├── CacheFormatError     not a cache, or one of a version or layout unknown here
        ├── CacheIncompleteError not sealed, or a shard is missing
        ├── CacheCorruptError    bytes that are not those which were written
        ├── CacheMismatchError   made by or for something else than what it is used with
        └── CacheLockedError     another process is writing to it

A message says what was found, what was expected, where, and what to do.
The command line prints it as one line and exits with 1.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

_NO_MEMORY = ("out of memory", "can't allocate memory")  # torch, of a device and of the host


class TodiError(Exception):
    """Base of every error that this library raises on purpose; it survives pickling, whatever it is made from."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes the same error: not by `__init__`, which may ask for more than `args`."""
        return Exception.__new__, (type(self), *self.args), vars(self)


class ConfigError(TodiError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(TodiError):
    """A data set cannot be read as examples."""


class ModelError(TodiError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit its use."""


class TeacherOutputError(ModelError):
    """The teacher's logits hold NaN or +inf; `row` says which row of those given."""

    def __init__(self, message: str, row: int) -> None:
        """Keep the row, so that a caller can name the example that it belongs to."""
        super().__init__(message)
        self.row = row


class EngineError(TodiError):
    """A serving engine has failed, does not answer, or works in a way that is unknown here."""


class TargetsError(TodiError):
    """Targets are asked for in a form that they do not have."""


class DivergedError(TodiError):
    """The loss of a training run is not a finite number."""


class OutOfMemoryError(TodiError):
    """The machine or a device has no memory left."""


class CacheError(TodiError):
    """A cache cannot be used."""


class CacheFormatError(CacheError):
    """A folder is not a cache, or one of a version or layout unknown here."""


class CacheIncompleteError(CacheError):
    """A cache is not sealed, or one of its shards is missing."""


class CacheCorruptError(CacheError):
    """Bytes of a cache are not those that were written."""


class CacheMismatchError(CacheError):
    """A cache was made by or for something else than what it is used with."""


class CacheLockedError(CacheError):
    """Another process is writing to the cache."""


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Within, memory that runs out is an error of ours, which says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
            raise OutOfMemoryError(f"out of memory: {first_line(error)}; {remedy}") from error
        raise


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within, an error of ours is one line on stderr and exit code 1: the last resort of a command line.

    So are the signals that ask a process to end: what is open is closed, and no lock or temporary file stays behind.
    """
    with _signals_that_exit():
        try:
            yield
        except TodiError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)


@contextlib.contextmanager
def _signals_that_exit() -> Iterator[None]:
    ours = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() != ours:  # a worker, which has nothing to say
            os._exit(128 + number)
        sys.exit(f"Error: ended by {signal.Signals(number).name}; what is committed is safe, the same command goes on")

    free = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in free:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, so that ours stays one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
