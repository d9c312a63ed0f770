"""Token ids and target masks in, content keys out: a key identifies a sequence."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16


def content_key(token_ids: npt.NDArray[np.uint32], target_mask: npt.NDArray[np.bool_]) -> bytes:
    """Return the content key of a sequence: a hash of 16 bytes over its token ids and its target mask."""
    state = hashlib.blake2b(len(token_ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    state.update(np.ascontiguousarray(token_ids, "<u4").tobytes())
    state.update(np.packbits(target_mask).tobytes())
    return state.digest()


@dataclass(frozen=True, slots=True, eq=False)
class ContentKeys:
    """The content keys of some sequences, in order.

    Numpy compares and sorts strings of 16 bytes correctly, but cuts the trailing zero bytes off every string that it
    returns. Therefore the array stays inside this class, and every key that leaves it has 16 bytes.

    >>> keys = ContentKeys.of([b"a" * 15 + bytes(1), b"b" * 16, b"a" * 15 + bytes(1)])
    >>> [len(key) for key in keys], keys.is_first().tolist()
    ([16, 16, 16], [True, True, False])
    """

    _array: npt.NDArray[np.bytes_]
    """[sequence], dtype S16."""

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> "ContentKeys":
        """Collect keys of 16 bytes each."""
        joined = bytearray()
        for key in keys:
            assert len(key) == KEY_BYTES, f"a content key has {KEY_BYTES} bytes, not {len(key)}"
            joined += key
        return cls(np.frombuffer(bytes(joined), f"S{KEY_BYTES}"))

    @classmethod
    def from_column(cls, column: Any) -> "ContentKeys":
        """Read an Arrow column of fixed-size binary values without empty cells."""
        return cls.of(column.to_pylist())

    @classmethod
    def from_hex(cls, lines: Iterable[str]) -> "ContentKeys":
        """Read keys of 32 hexadecimal digits each.

        Raises:
            ValueError: a line is no such key; names the line.
        """
        keys = []
        for line in lines:
            key = bytes.fromhex(line)
            if len(key) != KEY_BYTES:
                raise ValueError(f"{line!r} has {len(key)} bytes; a content key has {KEY_BYTES}")
            keys.append(key)
        return cls.of(keys)

    @classmethod
    def concatenate(cls, parts: Iterable["ContentKeys"]) -> "ContentKeys":
        """Join several collections, end to end."""
        return cls(np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(part._array for part in parts)]))

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._array)

    def __iter__(self) -> Iterator[bytes]:
        """Yield every key, 16 bytes each."""
        data = self._array.tobytes()
        return (data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: "npt.NDArray[Any] | slice") -> "ContentKeys": ...
    def __getitem__(self, index: "int | npt.NDArray[Any] | slice") -> "bytes | ContentKeys":
        """Return one key as 16 bytes, or some of the keys."""
        if isinstance(index, int | np.integer):
            place = range(len(self))[index]
            return self._array[place : place + 1].tobytes()
        return ContentKeys(self._array[index])

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same keys in the same order."""
        return isinstance(other, ContentKeys) and np.array_equal(self._array, other._array)

    __hash__ = None  # type: ignore[assignment]

    def find(self, wanted: "ContentKeys") -> npt.NDArray[np.int64]:
        """Return the first place of each wanted key among these keys, or -1.

        >>> ContentKeys.of([b"a" * 16, b"b" * 16, b"a" * 16]).find(ContentKeys.of([b"b" * 16, b"c" * 16])).tolist()
        [1, -1]
        """
        return KeyIndex.of(self).find(wanted)

    def is_first(self) -> npt.NDArray[np.bool_]:
        """Return for each key whether no earlier one equals it, [sequence]."""
        first = np.zeros(len(self), np.bool_)
        first[np.unique(self._array, return_index=True)[1]] = True
        return first

    def to_hex(self) -> list[str]:
        """Return every key as 32 hexadecimal digits."""
        return [key.hex() for key in self]

    def digest(self) -> str:
        """Return the hash of all keys in order, which identifies the content of a data set or of a shard."""
        return hashlib.blake2b(self._array.tobytes(), digest_size=KEY_BYTES).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class KeyIndex:
    """Content keys that are sorted once and searched many times."""

    _keys: npt.NDArray[np.bytes_]
    """[sequence], dtype S16."""
    _order: npt.NDArray[np.int64]

    @classmethod
    def of(cls, keys: ContentKeys) -> "KeyIndex":
        """Sort keys."""
        return cls(keys._array, np.argsort(keys._array, kind="stable"))

    def find(self, wanted: ContentKeys) -> npt.NDArray[np.int64]:
        """Return the first place of each wanted key among these keys, or -1."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        found = np.searchsorted(self._keys, wanted._array, sorter=self._order).clip(max=len(self._keys) - 1)
        places = self._order[found]
        return np.where(self._keys[places] == wanted._array, places, -1)
