"""A URL in, the objects below it out: a cache in an object store, through fsspec and local copies.

Credentials and endpoints are up to the backend: S3 reads `AWS_*` and `~/.aws`, Google `GOOGLE_APPLICATION_CREDENTIALS`.
All other options of fsspec's file systems can be set by variables such as `FSSPEC_S3_ENDPOINT_URL`, in
`~/.config/fsspec/`, or by `storage_options`.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from todi_offline.cache.store.base import Store, read_limit
from todi_offline.cache.store.locks import LEASE_SECONDS, LeaseLock
from todi_offline.cache.store.staging import Fetch, Staging
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError, ConfigError, first_line

logger = logging.getLogger(__name__)

_CONDITIONAL = ("s3://", "s3a://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class RemoteStore:
    """The objects below a URL such as `s3://bucket/prefix`. May be forked, pickled and shared between threads.

    `create` is one conditional request on S3 (If-None-Match) and Google Cloud Storage (ifGenerationMatch), and `swap`
    is one on S3 (If-Match): of several writers one succeeds. In other stores, and in S3-compatible ones that ignore the
    condition, `create` and `swap` look first and then write: two writers at the same moment can both succeed.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        staging: Staging | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Name the place; `storage_options` go to fsspec's file system of its protocol.

        `lease_seconds` is how long a lock must stand still before another writer takes it over.

        Raises:
            ConfigError: the protocol is unknown, its package is not installed, or it refuses the options.
        """
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})
        self.staging = staging or Staging()
        self.lease_seconds = lease_seconds
        self._versions: dict[str, tuple[str, int]] = {}  # name and size of the local copy, by key
        self._open()

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def read(self, key: str, limit: int | None = None) -> bytes:
        """Return an object; see `Store`."""
        limit = read_limit(key) if limit is None else limit
        try:
            with self._at(key, "read") as (files, path):
                data = bytes(files.cat_file(path, start=0, end=limit + 1))
        except CacheIncompleteError:
            raise
        except CacheError:
            if self.size(key) == 0:  # S3 refuses a range of an empty object
                return b""
            raise
        if len(data) > limit:
            raise CacheCorruptError(f"{self}/{key} has more than the {limit:,} bytes that are expected")
        return data

    def write(self, key: str, data: bytes) -> None:
        """Write an object; it appears when its last byte has arrived; see `Store`."""
        with self._at(key, "write") as (files, path):
            files.pipe_file(path, data)
        self._versions.pop(key, None)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless one is there; see `Store`, and above."""
        try:
            with self._at(key, "write") as (files, path):
                files.pipe_file(path, data, mode="create")
        except CacheError:
            # After a lost answer the client repeats its request, which then meets the object that it has written.
            if (size := self.size(key)) is None:
                raise
            return size == len(data) and self.read(key, size) == data
        self._versions.pop(key, None)
        return True

    def swap(self, key: str, data: bytes, old: bytes) -> bool:
        """Replace an object that still holds `old`: one conditional request on S3; see `Store`."""
        try:
            info = self._info(key)
            found = self.read(key, max(len(old), len(data)))
        except (CacheIncompleteError, CacheCorruptError):  # gone, or longer than both
            return False
        if found != old:
            return found == data
        # In one request: s3fs sends the parts of a large object without the condition.
        condition = {"IfMatch": info["ETag"], "chunksize": len(data) + 1} if "ETag" in info else {}
        try:
            with self._at(key, "write") as (files, path):
                files.pipe_file(path, data, **condition)
        except CacheError:
            found = self.read(key, max(self.size(key) or 0, len(data)))  # as in `create`
            if found == old:
                raise
            return found == data
        finally:
            self._versions.pop(key, None)
        return True

    def delete(self, key: str) -> None:
        """Remove an object; see `Store`."""
        with contextlib.suppress(CacheIncompleteError), self._at(key, "delete") as (files, path):
            files.rm_file(path)
        self._versions.pop(key, None)

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if it is missing; see `Store`."""
        try:
            return int(self._info(key)["size"])
        except CacheIncompleteError:
            return None

    def find(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix; see `Store`."""
        folder = prefix[: prefix.rfind("/") + 1]
        with self._at(folder, "list") as (files, path):
            names = files.find(path)
        root = path.removesuffix(folder)
        return sorted(name.removeprefix(root) for name in names if name.startswith(root + prefix))

    def local(self, key: str) -> Path:
        """Return a copy of an object in the staging folder; the copy stays while it is in use; see `Store`."""
        return self.staging.copy(*self._copied(key))

    def prepare(self, key: str) -> None:
        """Copy an object to the staging folder, as its most recently used one; see `Store`."""
        self.staging.prepare(*self._copied(key))

    def discard_copy(self, key: str) -> bool:
        """Delete the local copy of an object, so that the next `local` fetches it again; see `Store`."""
        found = self._versions.pop(key, None)
        if found:
            self.staging.drop(*found)
        return found is not None

    def copy_from(self, source: Store, source_key: str, key: str) -> bool:
        """Let the object store copy its own objects, and send it all others; see `Store`."""
        if self.size(key) is None:
            try:
                self._copy(source, source_key, key)
                return True
            except CacheIncompleteError:
                raise
            except CacheError:
                if self.size(key) is None:
                    raise
            finally:
                self._versions.pop(key, None)
        size = source.size(source_key)
        return size is not None and self.size(key) == size and self.read(key, size) == source.read(source_key, size)

    def _copy(self, source: Store, source_key: str, key: str) -> None:
        """Create a copy; as in `create`, on S3 in one conditional request."""
        if isinstance(source, RemoteStore) and source._open()[0] is self._open()[0]:
            condition = {"IfNoneMatch": "*"} if self.url.startswith(_CONDITIONAL) else {}
            with source._at(source_key, f"copy to {self}/{key}") as (files, origin):
                files.cp_file(origin, self._open()[1] + key, **condition)
        else:
            copy = source.local(source_key)
            with self._at(key, f"copy {copy} to") as (files, path):
                files.put_file(str(copy), path, mode="create")

    def lock(self) -> LeaseLock:
        """Return the lock of the place; see `Store`."""
        return LeaseLock(self, self.lease_seconds)

    def _open(self) -> tuple[Any, str]:
        """Return the file system of fsspec, which keeps one for each process and set of options, and the root in it."""
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(self.url, **{"use_listings_cache": False, **self.storage_options})
        except Exception as error:  # they have no common class
            extra = _EXTRAS.get(self.url.partition(":")[0])
            advice = f"; pip install 'todi-offline[{extra}]'" if extra and isinstance(error, ImportError) else ""
            raise ConfigError(f"cannot open {self}: {first_line(error)}{advice}") from error
        return files, root.rstrip("/") + "/"

    @contextlib.contextmanager
    def _at(self, key: str, doing: str) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the path of an object in it; turn errors of the backend into one line."""
        files, root = self._open()
        where = f"{self}/{key}"
        try:
            yield files, root + key
        except FileNotFoundError as error:
            if doing in ("write", "list") or "bucket does not exist" in str(error):
                raise CacheError(
                    f"cannot {doing} {where}: {_reason(error)}; create the bucket, or correct the URL"
                ) from error
            raise CacheIncompleteError(f"{self} lacks {key}; `todi-cache verify` lists every missing object") from error
        except Exception as error:  # they have no common class
            raise CacheError(
                f"cannot {doing} {where}: {_reason(error)}; "
                "check the URL, the credentials and the network, and run the command again"
            ) from error

    def _info(self, key: str) -> dict[str, Any]:
        with self._at(key, "look for") as (files, path):
            info: dict[str, Any] = files.info(path)
            if info["type"] != "file":
                raise FileNotFoundError(key)
            return info

    def _copied(self, key: str) -> tuple[str, int, Fetch]:
        """Return the name, the size and the fetch function for a local copy of an object as it is in the store."""
        if key not in self._versions:
            info = self._info(key)
            version = repr(sorted((name, str(value)) for name, value in info.items()))  # ETag, time, generation, ...
            digest = hashlib.sha256(f"{self}\0{key}\0{version}".encode()).hexdigest()[:32]
            self._versions[key] = f"{key.replace('/', '-')[-80:]}.{digest}", int(info["size"])
        name, size = self._versions[key]
        return name, size, partial(self._fetch, key, size)

    def _fetch(self, key: str, size: int, path: Path) -> None:
        """Fetch an object into a file; try twice, because not every backend retries after a broken body."""
        try:
            self._fetch_once(key, size, path)
        except CacheError as error:
            logger.info("%s; trying again", error)
            try:
                self._fetch_once(key, size, path)
            except CacheError:
                self._versions.pop(key, None)  # the object may have another size by now
                raise

    def _fetch_once(self, key: str, size: int, path: Path) -> None:
        with self._at(key, "fetch") as (files, origin):
            files.get_file(origin, str(path))
        if (found := path.stat().st_size) != size:
            raise CacheIncompleteError(
                f"{found:,} bytes of {self}/{key} arrived, expected {size:,}; run the command again, or check "
                "the network"
            )


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
