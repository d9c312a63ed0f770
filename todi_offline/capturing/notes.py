"""The attempts at shards that this process begins and ends in, notes in the cache out: they survive its death.

A process that dies says nothing. So before an attempt it writes down what is to be known if it dies, and it takes the
note back when the shard is committed, or when the attempt ends by anything but a death.
"""

import contextlib
import threading
from types import TracebackType

from todi_offline.cache.format.notes import Note
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.errors import CacheError


class Notes:
    """The notes of this process, for whichever of its threads."""

    def __init__(self, writer: ShardWriter) -> None:
        """Take what writes to the cache."""
        self._writer = writer
        self._lock = threading.Lock()
        self._before: dict[int, Note | None] = {}
        self._has_stopped = False

    def begin(self, note: Note, before: Note | None) -> None:
        """Leave a note for the case that this process dies at the shard.

        `before` takes its place when the attempt is given up without a death; None for no note.

        Raises:
            CacheError: the note cannot be written.
        """
        with self._lock:
            if not self._has_stopped:
                self._before[note.shard] = before
                self._writer.write_note(note)

    def keep(self, note: Note) -> None:
        """Write a note that stays when this process ends.

        Raises:
            CacheError: the note cannot be written.
        """
        with self._lock:
            self._writer.write_note(note)

    def end(self, shard: int) -> None:
        """Delete the note on a shard that is committed.

        Raises:
            CacheError: the note cannot be deleted.
        """
        with self._lock:
            if self._before.pop(shard, self) is not self:
                self._writer.delete_note(shard)

    def stop(self) -> None:
        """Take back what is said of the shards that are under way, as far as the store lets this process do so."""
        with self._lock:
            self._has_stopped = True
            while self._before:
                shard, note = self._before.popitem()
                with contextlib.suppress(CacheError):
                    if note is None:
                        self._writer.delete_note(shard)
                    else:
                        self._writer.restore_note(note)

    def __enter__(self) -> "Notes":
        """Do nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take back what is left: an error, or a signal that Python handles, has ended the work."""
        self.stop()
