"""The function that long work calls to report its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number of steps done and the number of all steps."""


def no_progress(_done: int, _total: int) -> None:
    """Report to nobody."""
