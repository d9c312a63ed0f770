"""What a store is: objects by key, each whole or not there; and how much is ever read of each kind."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from todi_offline.cache.format.names import GROUP_KEY, LOCK_KEY, RECORDS_PREFIX, ROOT_KEY
from todi_offline.cache.format.records import MAX_RECORD_BYTES
from todi_offline.cache.format.root import MAX_ROOT_BYTES

_LIMITS = {LOCK_KEY: 2**14, ROOT_KEY: MAX_ROOT_BYTES, GROUP_KEY: MAX_ROOT_BYTES}
_OTHER_LIMIT = 2**30  # sequence tables, tokenizers


def read_limit(key: str) -> int:
    """Return the most bytes that are read of an object of this kind, whatever it claims to have."""
    return MAX_RECORD_BYTES if key.startswith(RECORDS_PREFIX) else _LIMITS.get(key, _OTHER_LIMIT)


class Lock(Protocol):
    """Keeps other writers away, as long as it is not taken over."""

    @property
    def token(self) -> str:
        """What tells this holder from every other one: `locks.require_held` compares it."""


@runtime_checkable
class Store(Protocol):
    """Objects by key, such as `topk_ids/c/0/0`; its string is its place, for messages and to open it again."""

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return an object of at most `limit` bytes, by default the limit of its kind.

        Raises:
            CacheIncompleteError: it is missing.
            CacheCorruptError: it has more bytes.
            CacheError: it cannot be read.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object whole and durably, in place of what is there.

        Raises:
            CacheError: it cannot be written; nothing of it is left behind.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet; return whether it now holds these bytes.

        Of any number of writers one succeeds, and those that bring the same bytes. The same errors as `write`.
        """

    def swap(self, key: str, data: bytes, old: bytes) -> bool:
        """Replace an object in one step, if it still holds `old`; return whether it now holds `data`.

        The same errors as `write`.
        """

    def delete(self, key: str) -> None:
        """Remove an object, which may be gone already."""

    def size(self, key: str) -> int | None:
        """Return the bytes of an object, or None where there is none.

        Raises:
            CacheError: the store cannot tell.
        """

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix, sorted; whatever lies in the place, of this cache or not."""

    def local(self, key: str) -> Path:
        """Return a local file with an object's bytes; only to be read.

        Raises:
            CacheIncompleteError, CacheError: as `read`; of a folder, opening the file raises OSError instead.
        """

    def prepare(self, key: str) -> None:
        """Make a local copy of an object for a later `local`, where one is needed; the same errors."""

    def discard_copy(self, key: str) -> bool:
        """Forget the local copy of an object that turned out to be damaged; False where there is none."""

    def copy_from(self, source: "Store", source_key: str, key: str) -> bool:
        """Create an object with the bytes of another store's, moving none where possible; returns as `create`."""

    def lock(self) -> AbstractContextManager[Lock]:
        """Return a context within which no other process writes here.

        Raises:
            CacheLockedError: another process does; names it.
        """
