"""The place of a cache in, its objects out: bytes by key, each whole or not there.

A `Store` is a folder here, and what lies below a URL in `remote`.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from todi_offline.errors import CacheError, CacheIncompleteError, CacheLockedError, ConfigError

if TYPE_CHECKING:
    from todi_offline.cache.store.staging import Staging

LOCK_KEY = ".lock"
TEMPORARY_SUFFIX = ".tmp"
MAX_READ_BYTES = 2**30  # of an object that is read whole: metadata, records, sequence tables


@runtime_checkable
class Store(Protocol):
    """Objects by key, such as `topk_ids/c/0/0`; its string is its place, for messages and to open it again."""

    def read(self, key: str) -> bytes:
        """Return an object.

        Raises:
            CacheIncompleteError: it is missing.
            CacheError: it cannot be read.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object whole and durably, in place of what is there.

        Raises:
            CacheError: it cannot be written; nothing of it is left behind.
        """

    def create(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet.

        Raises:
            CacheLockedError: it is there: somebody else has written it.
            CacheError: as `write`.
        """

    def delete(self, key: str) -> None:
        """Remove an object, which may be gone already."""

    def size(self, key: str) -> int | None:
        """Return the bytes of an object, or None where there is none."""

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin so, sorted; whatever lies in the place, of this cache or not."""

    def local(self, key: str) -> Path:
        """Return a local file with an object's bytes; only to be read.

        Raises:
            CacheIncompleteError, CacheError: as `read`; of a folder, whoever opens the file finds out.
        """

    def prepare(self, key: str) -> None:
        """Have a local copy of an object made for a later `local`, where one is needed; the same errors."""

    def discard_copy(self, key: str) -> bool:
        """Forget the local copy of an object that turned out to be damaged; False where there is none."""

    def copy_from(self, source: "Store", source_key: str, key: str) -> None:
        """Write an object of another store under `key`, without moving its bytes where that is possible."""

    def lock(self) -> AbstractContextManager[Any]:
        """Return a context within which no other process writes here.

        Raises:
            CacheLockedError: another process does; says who.
        """


def open_store(place: "str | Path | Store", staging: "Staging | None" = None) -> Store:
    """Return the store at a place: a folder, or a URL such as `s3://bucket/prefix`.

    `staging` is where copies of a URL's objects are kept; a folder needs none.

    Raises:
        ConfigError: what a URL's protocol needs is not installed; or a URL has lost a slash, as in a `Path`.
    """
    if isinstance(place, Store):
        return place
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", str(place)):
        raise ConfigError(f"{place} is no folder, and a URL has two slashes; give it as a string, not as a Path")
    protocol, separator, rest = str(place).partition("://")
    if not separator or protocol in ("file", "local"):
        return LocalStore(Path(rest or place).expanduser())
    from todi_offline.cache.store.remote import RemoteStore

    return RemoteStore(str(place), staging=staging)


class LocalStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        """Name the folder; it is made when something is written."""
        self.root = root
        self._durable: set[Path] = set()

    def __str__(self) -> str:
        """Return the folder's path."""
        return str(self.root)

    def read(self, key: str) -> bytes:
        """Return an object; see `Store`."""
        path = self.root / key
        try:
            status = path.stat()
            if not (stat.S_ISREG(status.st_mode) or path.is_dir()) or status.st_size > MAX_READ_BYTES:
                raise CacheError(f"cannot read {path}: it is no regular file of at most {MAX_READ_BYTES:,} bytes")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise CacheIncompleteError(f"{self} lacks {key}; `todi-cache verify` lists all that is missing") from error
        except OSError as error:
            raise CacheError(f"cannot read {path}: {error.strerror}") from error

    def write(self, key: str, data: bytes) -> None:
        """Write an object under a temporary name, sync it, and rename it; see `Store`."""
        path = self.root / key
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            self._make_folder(path.parent)
            with _removed_on_failure(temporary):
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            _sync(path.parent)
        except OSError as error:
            raise CacheError(
                f"cannot write {path}: {error.strerror}; what is committed is safe; mend that and run it again"
            ) from error

    def create(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet; see `Store`. The lock keeps others away between look and write."""
        if self.size(key) is not None:
            raise CacheLockedError(f"{self.root / key} was written by another process meanwhile; run the command again")
        self.write(key, data)

    def delete(self, key: str) -> None:
        """Remove an object durably, and the folders that it leaves empty; see `Store`."""
        path = self.root / key
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync(path.parent)
        except OSError as error:
            raise CacheError(f"cannot delete {path}: {error.strerror}; mend that first") from error
        with contextlib.suppress(OSError):  # not empty
            for folder in path.relative_to(self.root).parents[:-1]:
                (self.root / folder).rmdir()

    def size(self, key: str) -> int | None:
        """Return the bytes of an object, or None where there is none; see `Store`."""
        try:
            status = (self.root / key).stat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin so; see `Store`."""
        return sorted(key for key in self._walk(self.root / prefix.rpartition("/")[0]) if key.startswith(prefix))

    def _walk(self, folder: Path) -> Iterator[str]:
        for path in folder.rglob("*"):
            if not path.is_dir() or path.is_symlink():
                yield path.relative_to(self.root).as_posix()

    def local(self, key: str) -> Path:
        """Return the object's own file; see `Store`."""
        return self.root / key

    def prepare(self, key: str) -> None:
        """Do nothing: the file is there; see `Store`."""

    def discard_copy(self, key: str) -> bool:  # noqa: ARG002 -- the protocol's
        """Return False: there are no copies; see `Store`."""
        return False

    def copy_from(self, source: Store, source_key: str, key: str) -> None:
        """Link to an object of another folder where the file system can, else copy it; see `Store`."""
        path, temporary = self.root / key, self.root / (key + TEMPORARY_SUFFIX)
        try:
            self._make_folder(path.parent)
            temporary.unlink(missing_ok=True)
            origin = source.local(source_key).resolve()  # a link to a symbolic link would lead elsewhere from here
            with _removed_on_failure(temporary):
                try:
                    temporary.hardlink_to(origin)
                except OSError:
                    shutil.copyfile(origin, temporary)
                _sync(temporary)  # a copy of a remote object may not be on its disk yet
                temporary.replace(path)
                temporary.unlink(missing_ok=True)  # renaming a link onto itself leaves it
            _sync(path.parent)
        except OSError as error:
            raise CacheError(
                f"cannot copy {source}/{source_key} to {path}: {error.strerror}; mend that first"
            ) from error

    def lock(self) -> "CacheLock":
        """Make the folder and return its lock; see `Store`."""
        try:
            self._make_folder(self.root)
            for folder in (self.root, *filter(Path.is_dir, self.root.iterdir())):
                _sync(folder)  # a killed process may have renamed there what now passes for committed
        except OSError as error:
            raise CacheError(f"cannot create {self}: {error.strerror}; choose another folder") from error
        return CacheLock(self.root)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it durable; what is there may be the work of a process killed before it was."""
        if folder in self._durable and folder.is_dir():
            return
        if folder.parent != folder:
            self._make_folder(folder.parent)
        made = not folder.is_dir()
        if made:
            folder.mkdir(exist_ok=True)
        try:
            _sync(folder.parent)
        except OSError:
            if made:  # else it is not ours to answer for
                raise
        self._durable.add(folder)


class CacheLock:
    """Holds a cache folder for one writing process; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; entering the context takes the lock."""
        self._path = folder / LOCK_KEY
        self._descriptor = -1

    def __enter__(self) -> "CacheLock":
        """Take the lock.

        Raises:
            CacheLockedError: another process holds it.
        """
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheError(f"cannot write in {self._path.parent}: {error.strerror}; mend that first") from error
        try:
            self._lock()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _lock(self) -> None:
        folder = self._path.parent
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_current():
                raise CacheLockedError(f"{folder} was let go by another process just now; run the same command again")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"
            raise CacheLockedError(f"{folder} is being written by {holder}; wait or stop it") from error
        except OSError as error:
            raise CacheError(f"cannot lock {folder}: {error.strerror}; mend that first") from error

    def _is_current(self) -> bool:
        """Whether the locked file still has its name: its last holder removes it, and a third may have made another."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the lock's file and let go of it; a file that cannot be removed locks nothing."""
        try:
            with contextlib.suppress(OSError):
                self._path.unlink()
        finally:
            os.close(self._descriptor)


@contextlib.contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    """Leave no temporary file behind whatever is raised, an interrupt included."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
