"""A folder in, its objects out."""

import contextlib
import errno
import filecmp
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

from todi_offline.cache.format.names import FOLDERS, temporary_key
from todi_offline.cache.store.base import Store, read_limit
from todi_offline.cache.store.locks import FolderLock
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class LocalStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        """Name the folder; the first write makes it."""
        self.root = root
        self._durable: set[Path] = set()

    def __str__(self) -> str:
        """Return the folder's path."""
        return str(self.root)

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return an object; see `Store`."""
        path, limit = self.root / key, read_limit(key) if limit is None else limit
        try:
            status = path.stat()
            if not (stat.S_ISREG(status.st_mode) or path.is_dir()):
                raise CacheError(f"cannot read {path}: it is not a regular file")
            with path.open("rb") as file:
                data = file.read(min(status.st_size, limit) + 1)  # a buffer of this size is made at once
        except FileNotFoundError as error:
            raise CacheIncompleteError(f"{self} lacks {key}; `todi-cache verify` lists every missing object") from error
        except OSError as error:
            raise CacheError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > limit:
            raise CacheCorruptError(f"{path} has {status.st_size:,} bytes; expected at most {limit:,}")
        return data

    def write(self, key: str, data: bytes) -> None:
        """Write an object under a temporary name, sync it, and rename it; see `Store`."""
        path = self.root / key
        with self._writing(path) as temporary:
            _write_synced(temporary, data)
            temporary.replace(path)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless one is there; see `Store`."""
        path = self.root / key
        if self.size(key) is None:
            with self._writing(path) as temporary:
                _write_synced(temporary, data)
                if _rename_to_new(temporary, path):
                    return True
        return self._holds(key, data)

    def swap(self, key: str, data: bytes, old: bytes) -> bool:
        """Replace an object that still holds `old`; see `Store`.

        No file system compares and renames in one step, so between the two only the lock keeps other writers away.
        """
        path = self.root / key
        if self._holds(key, old):
            with self._writing(path) as temporary:
                _write_synced(temporary, data)
                if self._holds(key, old):
                    temporary.replace(path)
        return self._holds(key, data)

    def _holds(self, key: str, data: bytes) -> bool:
        """Whether an object has these bytes; if so, make its name durable, which a killed process may not have done."""
        is_same = self.size(key) == len(data) and self.read(key, len(data)) == data
        if is_same:
            self._sync_folder(key)
        return is_same

    def _sync_folder(self, key: str) -> None:
        folder = (self.root / key).parent
        try:
            self._make_folder(folder)
            _sync(folder)
        except OSError as error:
            raise CacheError(f"cannot write {folder}: {error.strerror}; fix that first") from error

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary name beside a path; turn errors of the disk into one line, and leave no temporary file."""
        temporary = path.with_name(temporary_key(path.name, token_hex(8)))
        try:
            self._make_folder(path.parent)
            try:
                yield temporary
            finally:
                with contextlib.suppress(OSError):  # usually it is gone; if not, the next writer removes it
                    temporary.unlink()
            _sync(path.parent)
        except OSError as error:
            raise CacheError(
                f"cannot write {path}: {error.strerror}; committed work is safe: fix that and run the command again"
            ) from error

    def delete(self, key: str) -> None:
        """Remove an object durably, with the folders that become empty; see `Store`."""
        path = self.root / key
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync(path.parent)
        except OSError as error:
            raise CacheError(f"cannot delete {path}: {error.strerror}; fix that first") from error
        with contextlib.suppress(OSError):  # not empty
            for folder in path.relative_to(self.root).parents[:-1]:
                (self.root / folder).rmdir()

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if it is missing; see `Store`."""
        path = self.root / key
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheError(f"cannot look for {path}: {error.strerror}; fix that first") from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix; see `Store`."""
        folder = self.root / prefix.rpartition("/")[0]
        try:
            return sorted(key for key in self._walk(folder) if key.startswith(prefix))
        except OSError as error:
            raise CacheError(f"cannot list {folder}: {error.strerror}; fix that first") from error

    def _walk(self, folder: Path) -> Iterator[str]:
        """Yield all keys in a folder; a foreign folder that cannot be listed counts as one object."""
        closed: list[Path] = []

        def note(error: OSError) -> None:
            path = Path(error.filename)
            is_ours = path == self.root or path.relative_to(self.root).parts[0] in FOLDERS
            if is_ours and not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error
            closed.append(path)

        for parent, folders, files in os.walk(folder, onerror=note):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            yield from (Path(parent, name).relative_to(self.root).as_posix() for name in (*links, *files))
        yield from (path.relative_to(self.root).as_posix() for path in closed if path.exists() and path != folder)

    def local(self, key: str) -> Path:
        """Return the object's own file; see `Store`."""
        return self.root / key

    def prepare(self, key: str) -> None:
        """Do nothing: the file is there; see `Store`."""

    def discard_copy(self, key: str) -> bool:  # noqa: ARG002 -- the protocol's
        """Return False: there are no copies; see `Store`."""
        return False

    def copy_from(self, source: Store, source_key: str, key: str) -> bool:
        """Link to an object of another folder where the file system can, else copy it; see `Store`."""
        path = self.root / key
        if self._copy(source, source_key, path):
            return True
        origin = source.local(source_key)
        try:
            is_same = origin.samefile(path) or filecmp.cmp(origin, path, shallow=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CacheError(f"cannot compare {path} with {origin}: {error.strerror}; fix that first") from error
        if is_same:
            self._sync_folder(key)
        return is_same

    def _copy(self, source: Store, source_key: str, path: Path) -> bool:
        with self._writing(path) as temporary:
            origin = source.local(source_key).resolve()  # from here a relative symbolic link leads elsewhere
            _sync(origin)  # a copy of a remote object may not be on its disk yet
            try:
                path.hardlink_to(origin)
                return True
            except FileExistsError:
                return False
            except OSError:
                shutil.copyfile(origin, temporary)
                _sync(temporary)
                return _rename_to_new(temporary, path)

    def lock(self) -> FolderLock:
        """Make the folder and return its lock; see `Store`."""
        try:
            self._make_folder(self.root)
            for folder in (self.root, *filter(Path.is_dir, self.root.iterdir())):
                _sync(folder)  # a killed process may have renamed objects without a sync
        except OSError as error:
            raise CacheError(f"cannot create {self}: {error.strerror}; choose another folder") from error
        return FolderLock(self.root)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it durable; an existing one may come from a process killed before its sync."""
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
            if made:  # the folders above an existing one may not be ours to sync
                raise
        self._durable.add(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename_to_new(temporary: Path, path: Path) -> bool:
    """Give a file its name unless the name is taken: in one step where the file system has hard links."""
    try:
        path.hardlink_to(temporary)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    if path.exists():
        return False
    temporary.replace(path)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
