"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number done so far and all of them."""


def no_progress(_done: int, _total: int) -> None:
    """Say nothing."""
