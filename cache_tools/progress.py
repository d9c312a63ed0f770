"""Progress in, a bar on a terminal out; no output elsewhere."""

import contextlib
import sys
from collections.abc import Iterator

import click

from todi_offline.cache.progress import Progress


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Yield the function that moves a bar on stderr."""
    with click.progressbar(length=1, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield progress
