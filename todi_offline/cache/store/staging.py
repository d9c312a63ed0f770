"""Objects of a store in, local copies of them out: each whole or missing, all of them within a limit.

Any number of processes share one folder. A process locks (`flock`) the copies that it has used lately, and these stay.
Of the other copies, the least recently used ones go when room is needed. A process that fetches an object locks a file
beside the unfinished part. If it is killed, both files stay behind unlocked, and go in the same way.
"""

import contextlib
import errno
import fcntl
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from todi_offline.errors import CacheError
from todi_offline.folders import user_cache

DEFAULT_LIMIT_GB = 20.0
HELD = 32  # copies that a process keeps from removal: four shards of eight arrays
_COPY = ".staged"
_LOCK = ".fetching"
_PART = ".part"
_NAME = re.compile(r".+\.(\d+)(?:\.staged|\.fetching)")

Fetch = Callable[[Path], None]
"""Writes a whole object into a local file."""


class Staging:
    """A folder of copies; other files in it are never touched.

    Copies in use are not removed, so the processes exceed a limit that is less than they use at once.
    """

    def __init__(self, folder: Path | None = None, limit_gb: float = DEFAULT_LIMIT_GB) -> None:
        """Name the folder, by default one below $XDG_CACHE_HOME, and how much it may hold (in 10^9 bytes)."""
        self.folder = folder or _default_folder()
        self.limit_gb = limit_gb
        # Descriptors by name, the last used at the end. Each step is one operation of the dict, so threads need no
        # lock: a lock that another thread holds at a fork would stay locked in the child.
        self._held: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._held)
        _folders.add(self)

    def __reduce__(self) -> tuple[type["Staging"], tuple[Path, float]]:
        """Give another process the folder, but not the copies that this process holds."""
        return Staging, (self.folder, self.limit_gb)

    def copy(self, name: str, num_bytes: int, fetch: Fetch) -> Path:
        """Return the copy of this name and size; `fetch` makes it if it is missing.

        The copy stays until this process has asked for `HELD` other ones.

        Raises:
            CacheError: there is no room, or the folder cannot be written. Errors of `fetch` pass through.
        """
        path = self._path(name, num_bytes)
        try:
            self._held.move_to_end(path.name)
        except KeyError:
            self._keep(path.name, self._make(path, num_bytes, fetch))
        return path

    def prepare(self, name: str, num_bytes: int, fetch: Fetch) -> None:
        """Make the copy if it is missing, as the most recently used one; raises as `copy`."""
        _let_go(self._make(self._path(name, num_bytes), num_bytes, fetch))

    def drop(self, name: str, num_bytes: int) -> None:
        """Delete a copy; do nothing if it is gone already."""
        path = self._path(name, num_bytes)
        with contextlib.suppress(KeyError):
            _let_go(self._held.pop(path.name))
        path.unlink(missing_ok=True)

    def _path(self, name: str, num_bytes: int) -> Path:
        return self.folder / f"{name}.{num_bytes}{_COPY}"

    def _keep(self, name: str, descriptor: int) -> None:
        if self._held.setdefault(name, descriptor) != descriptor:
            _let_go(descriptor)  # another thread was faster
        while len(self._held) > HELD:
            with contextlib.suppress(KeyError):
                _let_go(self._held.popitem(last=False)[1])

    def _make(self, path: Path, num_bytes: int, fetch: Fetch) -> int:
        """Return an open, locked copy."""
        if num_bytes > self.limit_gb * 1e9:
            raise CacheError(
                f"{path.name} takes {num_bytes:,} bytes, but the limit of {self.folder} is {self.limit_gb:g} GB; raise "
                "the limit (staging_gb)"
            )
        try:
            while (descriptor := _hold(path, num_bytes)) is None:
                self._fetch(path, num_bytes, fetch)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room there, or lower the limit (staging_gb)" if full else "choose another folder (staging)"
            raise CacheError(f"cannot keep a copy in {self.folder}: {error.strerror}; {advice}") from error
        return descriptor

    def _fetch(self, path: Path, num_bytes: int, fetch: Fetch) -> None:
        """Fetch a copy under another name and rename it, unless another process has done so meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock, part = path.with_suffix(_LOCK), path.with_suffix(_PART)
        with locked_file(lock) as current:
            if not current:
                return
            try:
                if not path.exists():
                    self._make_room()
                    fetch(part)
                    assert part.stat().st_size == num_bytes, "the store compares sizes after fetching"
                    part.replace(path)
            finally:
                part.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the least recently used copies; unfinished ones count too."""
        found = []
        for path in self.folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_atime_ns, int(match[1]), path))
        excess = sum(size for _, size, _ in found) - self.limit_gb * 1e9
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            if _remove(path):
                excess -= size


def _default_folder() -> Path:
    return user_cache("staging")


def _hold(path: Path, num_bytes: int) -> int | None:
    """Open a copy and lock it against removal; return None if it is missing or cut short."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        whole = os.fstat(descriptor).st_size == num_bytes
        if whole and _is_at(descriptor, path):
            _touch(descriptor)
            return descriptor
        if not whole:
            path.unlink(missing_ok=True)
    except BaseException:
        _unlock(descriptor)
        raise
    _unlock(descriptor)
    return None


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[bool]:
    """Open or create a file and lock it; yield whether the locked file still has its name."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _is_at(descriptor, path)
    finally:
        _unlock(descriptor)


def _remove(path: Path) -> bool:
    """Remove a copy that no process holds, or the remains of a fetch."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = _is_at(descriptor, path)
        if current:
            path.with_suffix(_PART).unlink(missing_ok=True)
            path.unlink()
    except BlockingIOError:
        return False
    finally:
        _unlock(descriptor)
    return current


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _touch(descriptor: int) -> None:
    """Record the use of a copy; keep its time of modification, by which shard indices are cached."""
    os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))


def _let_go(descriptor: int) -> None:
    _touch(descriptor)
    _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    """Unlock, then close: a child that was forked in between has the file open too, and would keep the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _close_all(held: OrderedDict[str, int]) -> None:
    while held:
        os.close(held.popitem()[1])


def _after_fork() -> None:
    """Let a child hold no copy: its descriptors belong to its parent, which also releases the locks."""
    for staging in _folders:
        _close_all(staging._held)


_folders: "weakref.WeakSet[Staging]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
