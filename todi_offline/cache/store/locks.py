"""Who writes to a store: one process at a time, named in its object `.lock`.

A folder's lock is held by the kernel and ends with its process. In an object store the holder renews the lock while it
lives; when a lock stands still for a lease, its holder is gone and the next writer takes it over. A holder that was
only stalled finds out when it compares its token with the lock's, which it does before it replaces anything.
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
    """Tells the processes of this machine, since it started, from those of any other."""
    token: str
    renewed: int = 0
    """How often the holder has said that it lives."""
    has_ended: bool = False
    """Whether it let go of a lock that it had taken over: it leaves its name to the one it took it from."""

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Name this process."""
        return cls(os.getpid(), socket.gethostname(), _machine(), token_hex(8))

    def to_bytes(self) -> bytes:
        """Return the lock's object."""
        return json.dumps(to_dict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Holder | None":
        """Read a lock, which may hold anything: None where it names nobody."""
        try:
            values = json.loads(data)
            kinds = {field.name: type(getattr(_NOBODY, field.name)) for field in dataclasses.fields(cls)}
            is_right = values.keys() == kinds.keys() and all(type(values[name]) is kinds[name] for name in kinds)
            return cls(**values) if is_right else None
        except (ValueError, AttributeError, RecursionError):
            return None

    def __str__(self) -> str:
        """Name the process for people."""
        return f"process {self.process} on {self.host}"

    def is_dead(self) -> bool:
        """Whether it was a process of this machine and is no more."""
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
    """Return the process that a store's lock names, or None where there is no lock."""
    try:
        return Holder.from_bytes(store.read(LOCK_KEY))
    except CacheIncompleteError:
        return None


def require_held(store: Store, token: str) -> None:
    """Refuse to go on after the lock with this token was taken over.

    Raises:
        CacheLockedError: another process holds the lock, or held it since; names it where it can.
    """
    holder = read_holder(store)
    if holder is not None and holder.token == token:
        return
    who = "another process" if holder is None else str(holder)
    raise CacheLockedError(
        f"{store} was taken over by {who} while this process stood still; nothing that is committed was changed: "
        "run the command again, and it goes on from there"
    )


@contextlib.contextmanager
def naming_successor(store: Store, token: str) -> Iterator[None]:
    """Within, an error of a holder whose lock was taken over names the successor, whose work may have caused it."""
    try:
        yield
    except CacheLockedError:
        raise
    except CacheError:
        require_held(store, token)
        raise


class FolderLock:
    """Holds a folder for one writing process; the kernel lets go of it when the process ends, however it ends."""

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
                raise CacheLockedError(f"another process has just let go of {folder}; run the same command again")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._holder.to_bytes(), 0)
        except BlockingIOError as error:
            holder = Holder.from_bytes(os.pread(self._descriptor, 1000, 0)) or "another process"
            raise CacheLockedError(f"{folder} is being written by {holder}; wait for it, or stop it") from error
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
        """Remove the lock's file, unless it is another one by now, and let go of it."""
        try:
            if self._is_current():
                with contextlib.suppress(OSError):  # a file that cannot be removed locks nothing
                    self._path.unlink()
        finally:
            os.close(self._descriptor)


class LeaseLock:
    """An object that names the process which writes to an object store; it renews the object while it lives."""

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
        """Take the lock; waits for up to a lease where it cannot tell whether the holder lives.

        Raises:
            CacheLockedError: another process holds it.
        """
        if not self._store.create(LOCK_KEY, self._holder.to_bytes()):
            self._take_over()
        require_held(self._store, self.token)  # where the backend's creation is not exclusive
        self._renewing.start()
        return self

    def _take_over(self) -> None:
        """Replace the lock of a process that is gone."""
        try:
            data = self._store.read(LOCK_KEY)
        except CacheIncompleteError as error:
            message = f"another process has just let go of {self._store}; run the same command again"
            raise CacheLockedError(message) from error
        holder = Holder.from_bytes(data)
        is_free = holder is not None and (holder.has_ended or holder.is_dead())
        if not is_free:
            self._wait(data, str(holder or "another process"))
        if not self._store.swap(LOCK_KEY, self._holder.to_bytes(), data):
            raise CacheLockedError(f"another process has just taken {self._store}; wait for it, or stop it")
        self._took_over = not (holder is not None and holder.has_ended)

    def _wait(self, data: bytes, holder: str) -> None:
        """Return once the lock has stood still for a lease; refuse when it moves."""
        logger.warning(
            "%s is locked by %s; waiting up to %g s to see whether it lives", self._store, holder, self._lease_seconds
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
        """Say that this process lives, until the lock is let go of or lost."""
        while not self._ended.wait(self._lease_seconds / _RENEWALS):
            renewed = dataclasses.replace(self._holder, renewed=self._holder.renewed + 1)
            try:
                if not self._store.swap(LOCK_KEY, renewed.to_bytes(), self._holder.to_bytes()):
                    return  # taken over: `require_held` says so where it matters
            except CacheError as error:
                logger.warning("cannot renew the lock of %s: %s", self._store, error)
                continue
            self._holder = renewed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the lock, unless another process has taken it over."""
        self._ended.set()
        self._renewing.join()
        try:
            if self._took_over:
                ended = dataclasses.replace(self._holder, has_ended=True)
                self._store.swap(LOCK_KEY, ended.to_bytes(), self._holder.to_bytes())
            elif self._store.read(LOCK_KEY) == self._holder.to_bytes():
                self._store.delete(LOCK_KEY)
        except CacheError as failure:
            logger.warning("the lock %s/%s is left behind: %s", self._store, LOCK_KEY, failure)


def _machine() -> str:
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {Path('/proc/self/ns/pid').readlink()}"  # a container counts its processes anew
    except OSError:
        return f"{uuid.getnode():x}"
