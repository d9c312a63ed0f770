"""Work that is stopped from within, as an exception stops it."""

from todi_offline.cache.progress import Progress


class StoppedError(Exception):
    """The work was to end here."""


def stop_at(call: int) -> Progress:
    """Return a progress that ends the work when it is called for the `call`-th time."""
    count = 0

    def progress(_done: int, _total: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise StoppedError

    return progress
