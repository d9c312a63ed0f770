"""The protocol of a store: objects by key, each whole or missing; and the most that is read of each kind."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from todi_offline.cache.format.names import GROUP_KEY, LOCK_KEY, RECORDS_PREFIX, ROOT_KEY, is_attempt
from todi_offline.cache.format.notes import MAX_NOTE_BYTES
from todi_offline.cache.format.records import MAX_RECORD_BYTES
from todi_offline.cache.format.root import MAX_ROOT_BYTES

_LIMITS = {LOCK_KEY: 2**14, ROOT_KEY: MAX_ROOT_BYTES, GROUP_KEY: MAX_ROOT_BYTES}
_OTHER_LIMIT = 2**30  # sequence tables, tokenizers


def read_limit(key: str) -> int:
    """Return the most bytes that are read of an object of this kind, whatever size the store reports."""
    if is_attempt(key):
        return MAX_NOTE_BYTES
    return MAX_RECORD_BYTES if key.startswith(RECORDS_PREFIX) else _LIMITS.get(key, _OTHER_LIMIT)


class Lock(Protocol):
    """Keeps other writers away, unless one of them takes it over."""

    @property
    def token(self) -> str:
        """The mark of this holder, which no other holder has; `locks.require_held` compares it."""


@runtime_checkable
class Store(Protocol):
    """Objects by key, such as `topk_ids/c/0/0`. `str` gives the place, for messages and to open the store again."""

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return an object of at most `limit` bytes, by default the limit of its kind.

        Raises:
            CacheIncompleteError: the object is missing.
            CacheCorruptError: the object has more bytes.
            CacheError: the object cannot be read.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object whole and durably; replace an earlier one.

        Raises:
            CacheError: the object cannot be written; no part of it is left behind.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless one is there; return whether the object now holds these bytes.

        Of several writers one succeeds, and so do writers of the same bytes. Raises as `write`.
        """

    def swap(self, key: str, data: bytes, old: bytes) -> bool:
        """Replace an object in one step if it still holds `old`; return whether it now holds `data`.

        Raises as `write`.
        """

    def delete(self, key: str) -> None:
        """Remove an object; do nothing if it is gone already."""

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if it is missing.

        Raises:
            CacheError: the store cannot tell.
        """

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix, sorted; keys of foreign files too."""

    def local(self, key: str) -> Path:
        """Return a local file with the bytes of an object; callers may only read it.

        Raises:
            CacheIncompleteError, CacheError: as `read`; for a folder, opening the file raises OSError instead.
        """

    def prepare(self, key: str) -> None:
        """Make a local copy of an object for a later `local`, if the store needs one; raises as `local`."""

    def discard_copy(self, key: str) -> bool:
        """Delete the local copy of an object, because it is damaged; return False if there is none."""

    def copy_from(self, source: "Store", source_key: str, key: str) -> bool:
        """Create an object with the bytes of an object of another store, by a link if possible; returns as `create`."""

    def lock(self) -> AbstractContextManager[Lock]:
        """Return a context within which no other process writes here.

        Raises:
            CacheLockedError: another process does; names that process.
        """
