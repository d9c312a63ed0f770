"""Everything that this library raises on purpose.

    TodiError
    ├── ConfigError              a setting that is unknown, out of range or contradicts another
    ├── DataError                a data set that cannot be read as examples
    ├── ModelError               a model, tokenizer or adapter that cannot be loaded or does not fit
    │   └── TeacherOutputError   NaN or +inf among the teacher's logits
    ├── EngineError              a serving engine that has failed, does not answer, or is unknown
    ├── TargetsError             targets asked for in a form that they do not have
    ├── DivergedError            a run whose loss is no longer finite
    ├── OutOfMemoryError         the machine or a device has no memory left
    └── CacheError               a cache that cannot be used
        ├── CacheFormatError     not a cache, or a cache of an unknown version or layout
        ├── CacheIncompleteError not sealed, or a shard is missing
        ├── CacheCorruptError    bytes differ from those that were written
        ├── CacheMismatchError   made by another teacher, or with another tokenizer or other settings
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
    """Base of every error that this library raises on purpose; it can be pickled, whatever its arguments."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process rebuilds the error: without `__init__`, which may ask for more than `args`."""
        return Exception.__new__, (type(self), *self.args), vars(self)


class ConfigError(TodiError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(TodiError):
    """A data set cannot be read as examples."""


class ModelError(TodiError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit its use."""


class TeacherOutputError(ModelError):
    """The teacher's logits hold NaN or +inf; `row` is the number of the first such row."""

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
    """A folder is not a cache, or a cache of an unknown version or layout."""


class CacheIncompleteError(CacheError):
    """A cache is not sealed, or one of its shards is missing."""


class CacheCorruptError(CacheError):
    """Bytes of a cache differ from those that were written."""


class CacheMismatchError(CacheError):
    """A cache was made by another teacher, or with another tokenizer or other settings."""


class CacheLockedError(CacheError):
    """Another process is writing to the cache."""


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """In this context, running out of memory raises `OutOfMemoryError`, which says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
            raise OutOfMemoryError(f"out of memory: {first_line(error)}; {remedy}") from error
        raise


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """In this context, a `TodiError` becomes one line on stderr and exit code 1, as a command line needs.

    So do the signals that stop a process: files are closed, and no lock or temporary file stays behind.
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
        if os.getpid() != ours:  # a worker: only the first process prints
            os._exit(128 + number)
        name = signal.Signals(number).name
        sys.exit(f"Error: stopped by {name}; committed work is safe, and the same command resumes it")

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
