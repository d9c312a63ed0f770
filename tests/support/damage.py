"""Kinds of damage to the files of a cache: functions of its folder, a random generator and another cache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Files = dict[str, bytes]
Damage = Callable[[Path, np.random.Generator, Path], str]


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def contents_of(root: Path) -> Files:
    """Return the bytes of every file of a folder, by key."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files_of(root)}


def drawn(root: Path, rng: np.random.Generator) -> Path:
    files = files_of(root)
    return files[int(rng.integers(len(files)))]


def flip(root: Path, rng: np.random.Generator, _: Path) -> str:
    path = drawn(root, rng)
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path.name


def truncate(root: Path, rng: np.random.Generator, _: Path) -> str:
    path = drawn(root, rng)
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])
    return path.name


def overwrite(root: Path, rng: np.random.Generator, _: Path) -> str:
    """Overwrite a random range of a file with zeros, like a lost block."""
    path = drawn(root, rng)
    data = bytearray(path.read_bytes())
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 512))
    data[start : start + length] = bytes(len(data[start : start + length]))
    if data == path.read_bytes():
        return overwrite(root, rng, _)
    path.write_bytes(data)
    return path.name


def append(root: Path, rng: np.random.Generator, _: Path) -> str:
    path = drawn(root, rng)
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 50))))
    return path.name


def delete(root: Path, rng: np.random.Generator, _: Path) -> str:
    path = drawn(root, rng)
    path.unlink()
    return path.name


def swap(root: Path, rng: np.random.Generator, other: Path) -> str:
    first, second = drawn(root, rng), drawn(root, rng)
    mine, yours = first.read_bytes(), second.read_bytes()
    if mine == yours:
        return swap(root, rng, other)
    first.write_bytes(yours)
    second.write_bytes(mine)
    return f"{first.name} and {second.name}"


def replace(root: Path, rng: np.random.Generator, other: Path) -> str:
    """Replace a file with the same file of another cache, as an interrupted copy does."""
    path = drawn(root, rng)
    theirs = (other / path.relative_to(root)).read_bytes()
    if theirs == path.read_bytes():
        return replace(root, rng, other)
    path.write_bytes(theirs)
    return path.name


def stray(root: Path, rng: np.random.Generator, _: Path) -> str:
    path = drawn(root, rng).with_name("stray.bin")
    path.write_bytes(rng.bytes(10))
    return path.name


KINDS: tuple[Damage, ...] = (flip, truncate, overwrite, append, delete, swap, replace, stray)
