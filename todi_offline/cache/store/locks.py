"""A store in, the lock of its one writing process out; the object `.lock` names the process.

The kernel holds the lock of a folder and releases it when the process ends. In an object store the holder renews the
lock while it lives. When a lock stands still for a lease, the next writer takes it over. A holder that was only stalled
notices this when it compares its token with that of the lock, which it does before it replaces any object.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from types import TracebackType

from todi_offline.cache.format.names import LOCK_KEY
from todi_offline.cache.store.base import Store
from todi_offline.config import to_dict
from todi_offline.errors import CacheError, CacheIncompleteError, CacheLockedError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_RENEWALS = 4  # in a lease
_POLLS = 20


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that a lock names."""

    process: int
    host: str
    machine: str
    """The mark of this machine since its start; processes of other machines have another one."""
    token: str
    renewed: int = 0
    """How often the holder has renewed the lock."""
    has_ended: bool = False
    """Whether the holder has released a lock that it had taken over; its name stays for the stalled process."""

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Return this process as a holder."""
        return cls(os.getpid(), socket.gethostname(), _machine(), token_hex(8))

    def to_bytes(self) -> bytes:
        """Return the lock's object."""
        return json.dumps(to_dict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Holder | None":
        """Read a lock; return None if its bytes name no process."""
        try:
            values = json.loads(data)
            kinds = {field.name: type(getattr(_NOBODY, field.name)) for field in dataclasses.fields(cls)}
            is_right = values.keys() == kinds.keys() and all(type(values[name]) is kinds[name] for name in kinds)
            return cls(**values) if is_right else None
        except (ValueError, AttributeError, RecursionError):
            return None

    def __str__(self) -> str:
        """Describe the process in words."""
        return f"process {self.process} on {self.host}"

    def is_dead(self) -> bool:
        """Whether the holder was a process of this machine and has ended."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False


_NOBODY = Holder(0, "", "", "")


def read_holder(store: Store) -> Holder | None:
    """Return the process that the lock of a store names, or None without a lock."""
    try:
        return Holder.from_bytes(store.read(LOCK_KEY))
    except CacheIncompleteError:
        return None


def require_held(store: Store, token: str, *, or_released: bool = False) -> None:
    """Refuse to continue after another process has taken over the lock with this token.

    With `or_released`, a process may also continue that holds no lock any more, as long as no other one does.

    Raises:
        CacheLockedError: another process holds the lock, or has held it since; names that process if it can.
    """
    holder = read_holder(store)
    if or_released if holder is None else holder.token == token:
        return
    who = "another process" if holder is None else str(holder)
    raise CacheLockedError(
        f"{store} was taken over by {who} while this process stood still; committed shards are unharmed: run the "
        "command again, and it continues from there"
    )


@contextlib.contextmanager
def naming_successor(store: Store, token: str) -> Iterator[None]:
    """Within this context, an error of a holder that was taken over names its successor, the likely cause."""
    try:
        yield
    except CacheLockedError:
        raise
    except CacheError:
        require_held(store, token)
        raise


class FolderLock:
    """Locks a folder for one writing process; the kernel releases the lock when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; entering the context takes the lock."""
        self._path = folder / LOCK_KEY
        self._descriptor = -1
        self._holder = Holder.of_this_process()

    @property
    def token(self) -> str:
        """What tells this holder from every other one."""
        return self._holder.token

    def __enter__(self) -> "FolderLock":
        """Take the lock.

        Raises:
            CacheLockedError: another process holds it.
        """
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CacheError(f"cannot write in {self._path.parent}: {error.strerror}; fix that first") from error
        try:
            self._lock()
        except BaseException:
            os.close(self._descriptor)
            raise
        _taken.add(self)
        return self

    def _lock(self) -> None:
        folder = self._path.parent
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_current():
                raise CacheLockedError(f"another process has just released {folder}; run the same command again")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._holder.to_bytes(), 0)
        except BlockingIOError as error:
            holder = Holder.from_bytes(os.pread(self._descriptor, 1000, 0)) or "another process"
            raise CacheLockedError(f"{folder} is being written by {holder}; wait for it, or stop it") from error
        except OSError as error:
            raise CacheError(f"cannot lock {folder}: {error.strerror}; fix that first") from error

    def _is_current(self) -> bool:
        """Whether the locked file still has its name, and no other process has removed or replaced it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the file of the lock, unless its name belongs to another file by now, and release the lock."""
        if self not in _taken:  # in a child
            return
        _taken.remove(self)
        try:
            if self._is_current():
                with contextlib.suppress(OSError):  # a file that cannot be removed locks nothing
                    self._path.unlink()
        finally:
            os.close(self._descriptor)


def _after_fork() -> None:
    """Let a child hold no lock: it may outlive its parent, such as a worker that loads data, and would block others."""
    while _taken:
        os.close(_taken.pop()._descriptor)


_taken: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)


class LeaseLock:
    """Locks an object store by an object that names the writing process, which renews the object while it lives."""

    def __init__(self, store: Store, lease_seconds: float = LEASE_SECONDS) -> None:
        """Name the store; entering the context takes the lock."""
        self._store = store
        self._lease_seconds = lease_seconds
        self._holder = Holder.of_this_process()
        self._took_over = False
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="todi_offline lease", daemon=True)

    @property
    def token(self) -> str:
        """What tells this holder from every other one."""
        return self._holder.token

    def __enter__(self) -> "LeaseLock":
        """Take the lock; wait for up to a lease if it is unknown whether the present holder lives.

        Raises:
            CacheLockedError: another process holds it.
        """
        if not self._store.create(LOCK_KEY, self._holder.to_bytes()):
            self._take_over()
        require_held(self._store, self.token)  # for backends whose creation is not exclusive
        self._renewing.start()
        return self

    def _take_over(self) -> None:
        """Replace the lock of a process that is gone."""
        try:
            data = self._store.read(LOCK_KEY)
        except CacheIncompleteError as error:
            message = f"another process has just released {self._store}; run the same command again"
            raise CacheLockedError(message) from error
        holder = Holder.from_bytes(data)
        is_free = holder is not None and (holder.has_ended or holder.is_dead())
        if not is_free:
            self._wait(data, str(holder or "another process"))
        if not self._store.swap(LOCK_KEY, self._holder.to_bytes(), data):
            raise CacheLockedError(f"another process has just taken {self._store}; wait for it, or stop it")
        self._took_over = not (holder is not None and holder.has_ended)

    def _wait(self, data: bytes, holder: str) -> None:
        """Return when the lock has stood still for a lease; refuse if its holder renews it."""
        logger.warning(
            "%s is locked by %s; waiting up to %g s to see whether that process still runs",
            self._store,
            holder,
            self._lease_seconds,
        )
        deadline = time.monotonic() + self._lease_seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, self._lease_seconds / _POLLS))
            try:
                stands_still = self._store.read(LOCK_KEY) == data
            except CacheIncompleteError:
                stands_still = False
            if not stands_still:
                raise CacheLockedError(f"{self._store} is being written by {holder}; wait for it, or stop it")

    def _renew(self) -> None:
        """Renew the lock until this process releases or loses it."""
        while not self._ended.wait(self._lease_seconds / _RENEWALS):
            renewed = dataclasses.replace(self._holder, renewed=self._holder.renewed + 1)
            try:
                if not self._store.swap(LOCK_KEY, renewed.to_bytes(), self._holder.to_bytes()):
                    return  # another process has taken over, which `require_held` will report
            except CacheError as error:
                logger.warning("cannot renew the lock of %s: %s", self._store, error)
                continue
            self._holder = renewed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock, unless another process has taken it over."""
        self._ended.set()
        self._renewing.join()
        try:
            if self._took_over:
                ended = dataclasses.replace(self._holder, has_ended=True)
                self._store.swap(LOCK_KEY, ended.to_bytes(), self._holder.to_bytes())
            elif self._store.read(LOCK_KEY) == self._holder.to_bytes():
                self._store.delete(LOCK_KEY)
        except CacheError as failure:
            logger.warning("the lock %s/%s was not released: %s", self._store, LOCK_KEY, failure)


def _machine() -> str:
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {Path('/proc/self/ns/pid').readlink()}"  # a container counts its processes anew
    except OSError:
        return f"{uuid.getnode():x}"
