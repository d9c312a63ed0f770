"""The disk operations of a process, intercepted: tests count them, fail them, die in them, or lose power.

    with Watch(folder, before) as watch: ...    # `before` is called before every operation below the folder
    after_power_loss(watch.log, model, rng)     # files that a disk may hold after a power loss at this point

The modelled disk promises no more than POSIX does. The bytes of a file are safe once the file is synced, and the names
in a folder once the folder is synced. A rename happens as a whole or not at all. Any combination of changes that were
not synced may survive.
"""

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from unittest import mock

import numpy as np

Kind = Literal["mkdir", "rmdir", "create", "write", "sync", "rename", "unlink", "link"]
Model = Literal["unsynced is lost", "names are kept", "anything"]
MODELS: tuple[Model, ...] = ("unsynced is lost", "names are kept", "anything")
ROOT = "."


@dataclass(frozen=True)
class Operation:
    """One operation; paths are relative to the watched folder."""

    kind: Kind
    path: str
    source: str = ""
    """The file that is renamed or linked to `path`; empty if the file lies outside of the folder."""
    data: bytes = b""
    """The written bytes, or the bytes of the file that is synced, renamed or linked."""


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Calls `before` with every operation below a folder, then performs it and adds it to `log`."""

    def __init__(self, root: Path, before: Callable[[Operation], None] = lambda _: None) -> None:
        self.log: list[Operation] = []
        self._root = root.resolve()
        self._before = before
        self._paths: dict[int, str] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        names = ("open", "mkdir", "rmdir", "unlink", "remove", "replace", "rename", "link", "fsync", "write", "pwrite")
        real: dict[str, Any] = {name: getattr(os, name) for name in names}

        def watch(name: str, kind: Kind) -> None:
            def patched(*args: Any, **options: Any) -> Any:
                path, source = (args[1], args[0]) if kind in ("rename", "link") else (args[0], None)
                data = bytes(args[1]) if kind == "write" else b""
                return self._do(lambda: real[name](*args, **options), kind, path, source, data)

            self._patch(os, name, patched)

        kinds: dict[str, Kind] = {"remove": "unlink", "replace": "rename", "pwrite": "write", "fsync": "sync"}
        for name in names[1:]:
            watch(name, kinds.get(name, name))  # type: ignore[arg-type]
        self._patch(os, "open", self._opening(real["open"]))
        opening = self._opening(io.open)
        self._patch(io, "open", opening)
        self._patch(builtins, "open", opening)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _patch(self, module: Any, name: str, value: Any) -> None:
        self._patches.enter_context(mock.patch.object(module, name, value))

    def _opening(self, real: Any) -> Any:
        """Return `os.open` or `open`, watched: making a file is an operation, and so is each write to the file."""

        def patched(path: Any, mode: Any = "r", *args: Any, **options: Any) -> Any:
            writes = bool(mode & (os.O_CREAT | os.O_TRUNC)) if isinstance(mode, int) else set(mode) & set("wxa+")
            if isinstance(path, int):
                return real(path, mode, *args, **options)
            opened = self._do(lambda: real(path, mode, *args, **options), "create" if writes else None, path)
            descriptor = opened if isinstance(opened, int) else opened.fileno()
            self._paths[descriptor] = os.fsdecode(path)
            if isinstance(opened, int) or not writes or self._key(path) is None:
                return opened
            return _File(opened, lambda data: self._do(lambda: opened.write(data), "write", path, data=bytes(data)))

        return patched

    def _do(
        self, operation: Callable[[], Any], kind: Kind | None, path: Any, source: Any = None, data: bytes = b""
    ) -> Any:
        key = self._key(path)
        if key is None or kind is None:
            return operation()
        origin = Path(source) if source is not None else self._root / key
        if kind in ("sync", "rename", "link") and origin.is_file():
            data = origin.read_bytes()
        asked = Operation(kind, key, (source is not None and self._key(source)) or "", data)
        self._before(asked)
        result = operation()
        self.log.append(asked)
        return result

    def _key(self, path: Any) -> str | None:
        if isinstance(path, int):
            path = self._paths.get(path, "/")
        place = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 -- follows no link
        return place.relative_to(self._root).as_posix() if place.is_relative_to(self._root) else None


class _File(contextlib.AbstractContextManager["_File"]):
    """A file whose writing is watched."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file = file
        self.write = write

    def __exit__(self, *details: Any) -> None:
        self._file.__exit__(*details)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class FailingReads(contextlib.AbstractContextManager["FailingReads"]):
    """Counts the operations that read, look for or list files below a folder; the n-th operation fails."""

    def __init__(self, root: Path, at: int = 0, cause: int = errno.EIO) -> None:
        self.count = 0
        self.asked = ""
        """The operation that failed."""
        self._root, self._at, self._cause = str(root), at, cause
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "FailingReads":
        for name in ("stat", "lstat", "scandir", "pread", "fstat"):
            self._patches.enter_context(mock.patch.object(os, name, self._failing(name, getattr(os, name))))
        self._patches.enter_context(mock.patch.object(os, "open", self._failing("open", os.open)))
        opening = self._failing("open", io.open)
        self._patches.enter_context(mock.patch.object(io, "open", opening))
        self._patches.enter_context(mock.patch.object(builtins, "open", opening))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _failing(self, name: str, real: Any) -> Any:
        def patched(path: Any, *args: Any, **options: Any) -> Any:
            where = str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else os.fsdecode(path)
            if where.startswith(self._root):
                self.count += 1
                if self.count == self._at:
                    self.asked = f"{name} {where.removeprefix(self._root)}"
                    raise OSError(self._cause, os.strerror(self._cause), where)
            result = real(path, *args, **options)
            return _FailingFile(result, lambda: patched_read(where)) if isinstance(result, io.IOBase) else result

        def patched_read(where: str) -> None:
            if where.startswith(self._root):
                self.count += 1
                if self.count == self._at:
                    self.asked = f"read {where.removeprefix(self._root)}"
                    raise OSError(self._cause, os.strerror(self._cause), where)

        return patched


class _FailingFile(contextlib.AbstractContextManager["_FailingFile"]):
    """A file that calls `before` ahead of each read."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self._file, self._before = file, before

    def read(self, *args: Any) -> Any:
        self._before()
        return self._file.read(*args)

    def __exit__(self, *details: Any) -> None:
        self._file.__exit__(*details)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def after_power_loss(log: Sequence[Operation], model: Model, rng: np.random.Generator) -> dict[str, bytes]:
    """Return the files that a disk may hold, had the power failed after these operations."""
    disk = _Disk()
    for operation in log:
        disk.do(operation)
    return dict(disk.survivors(model, rng))


def put_files(root: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files."""
    root.mkdir(parents=True, exist_ok=True)
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)


_FOLDER = -1
_Entries = dict[str, int | None]
"""The number of the file at a path, _FOLDER for a folder, or None for a path that was deleted."""


class _Disk:
    """The safe entries, and the later changes, which may be lost."""

    def __init__(self) -> None:
        self._safe: _Entries = {}
        self._pending: list[tuple[str, _Entries]] = []
        self._written: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}
        self._number = 0

    def do(self, asked: Operation) -> None:
        if asked.kind == "create":
            if self._names().get(asked.path) is None:
                self._number += 1
                self._change(asked.path, {asked.path: self._number})
        elif asked.kind == "mkdir":
            self._change(asked.path, {asked.path: _FOLDER})
        elif asked.kind in ("unlink", "rmdir"):
            self._change(asked.path, {asked.path: None})
        elif asked.kind == "write":
            number = self._file(asked.path)
            self._written[number] = self._written.get(number, b"") + asked.data
        elif asked.kind in ("rename", "link"):
            self._move(asked)
        else:
            self._sync(asked)

    def _move(self, asked: Operation) -> None:
        if asked.source:
            number = self._file(asked.source)
        else:
            number = self._number = self._number + 1
        self._written[number] = asked.data
        gone: _Entries = {asked.source: None} if asked.kind == "rename" else {}
        self._change(asked.path, gone | {asked.path: number})

    def _sync(self, asked: Operation) -> None:
        if asked.path != ROOT and self._names().get(asked.path) != _FOLDER:
            self._synced[self._file(asked.path)] = asked.data
            return
        for parent, change in self._pending:
            if parent == asked.path:
                self._safe |= change
        self._pending = [(parent, change) for parent, change in self._pending if parent != asked.path]

    def _change(self, path: str, change: _Entries) -> None:
        self._pending.append((PurePosixPath(path).parent.as_posix(), change))

    def _file(self, path: str) -> int:
        number = self._names()[path]
        assert number is not None, f"{path} was deleted"
        assert number != _FOLDER, f"{path} is a folder"
        return number

    def _names(self) -> _Entries:
        names = dict(self._safe)
        for _, change in self._pending:
            names |= change
        return names

    def survivors(self, model: Model, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
        names = dict(self._safe)
        for _, change in self._pending:
            if model == "names are kept" or (model == "anything" and rng.random() < 0.5):
                names |= change
        for path, number in names.items():
            folders = [parent.as_posix() for parent in PurePosixPath(path).parents][:-1]
            if number not in (None, _FOLDER) and all(names.get(folder) == _FOLDER for folder in folders):
                assert number is not None
                yield path, self._bytes(number, model, rng)

    def _bytes(self, number: int, model: Model, rng: np.random.Generator) -> bytes:
        if number in self._synced:
            return self._synced[number]
        written = self._written.get(number, b"")
        torn = [b"", written[: len(written) // 2], bytes(len(written)), written]
        return torn[int(rng.integers(4))] if model == "anything" else b""
