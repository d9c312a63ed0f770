"""The store of one cache in, its sequences out, in any order and with all that they hold."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.fetching import at_once, fetch, streamed
from todi_offline.cache.format.encoding import decode_rows
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.root import Root
from todi_offline.cache.format.sequences import CachedSequence, require_places
from todi_offline.cache.objects import committed_shards, open_shard, read_record, read_root, read_table
from todi_offline.cache.store import Store
from todi_offline.errors import CacheCorruptError, CacheError, CacheIncompleteError

_PLACE = ("shard", "token_start", "num_tokens", "target_start", "num_targets")
_NUMBERS = (*_PLACE, "teacher_nll", "topk_mass")


def open_stored(store: Store, *, allow_unsealed: bool = False) -> "StoredCache":
    """Open a cache for reading as it is now; see `reader.open_cache`."""
    root = read_root(store)
    if not allow_unsealed:
        _require_whole(store, root)
    named = {shard: commit for shard, commit in enumerate(root.commits) if commit is not None}
    begun = committed_shards(store) if allow_unsealed else []
    most = sum(part.num_shards for part in root.parts)
    shards = {**named, **{shard: None for shard in begun if len(root.commits) <= shard < most}}
    manifest = dataclasses.replace(root.manifest, parts=root.parts) if allow_unsealed else root.manifest
    return StoredCache(store, manifest, at_once(partial(read_record, store, manifest), shards.keys(), shards.values()))


def _require_whole(store: Store, root: Root) -> None:
    if lost := root.lost_shards:
        raise CacheIncompleteError(
            f"{store} has lost the shards {', '.join(map(str, lost))}: run the capture that wrote them again, or open "
            "the cache with allow_unsealed (--allow-unsealed) to use the other shards"
        )
    if not root.commits:
        raise CacheIncompleteError(
            f"{store} is not finished: run the same `todi capture` again to finish it, or open the cache with "
            "allow_unsealed (--allow-unsealed) to use its committed shards"
        )


class StoredCache:
    """The sequences of one cache. Holds no open file, so it may be forked and shared between threads."""

    def __init__(self, store: Store, manifest: Manifest, records: Sequence[CommitRecord]) -> None:
        """Use `open_stored`."""
        if not records:
            raise CacheIncompleteError(f"{store} holds no committed shard yet; run its capture again")
        self.store = store
        self.manifest = manifest
        self.content_keys, self.columns = _joined(streamed(partial(_read_columns, store, self.manifest), records))
        pa.default_memory_pool().release_unused()  # the threads leave as much again behind
        self._records = records
        self._objects = {key: found for record in records for key, found in record.objects.items()}

    content_keys: ContentKeys
    columns: Mapping[str, npt.NDArray[Any]]
    """The numbers of the sequence table, [sequence] each; with the keys they take 52 bytes a sequence in memory."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.content_keys)

    def read(self, index: int) -> CachedSequence:
        """Read a sequence; compare the checksum of every chunk that it touches.

        Raises:
            CacheCorruptError, CacheIncompleteError: naming sequence, file and chunk.
        """
        shard, token_start, num_tokens, target_start, num_targets = (int(self.columns[name][index]) for name in _PLACE)
        first = shard * self.manifest.settings.shard_tokens
        spans = {
            "token": (token_start - first, token_start - first + num_tokens),
            "target": (target_start - first, target_start - first + num_targets),
        }
        try:
            arrays = {
                name: self._read_rows(name, shard, *spans[spec.axis]) for name, spec in self.manifest.arrays.items()
            }
            return self._decode(arrays)
        except CacheError as error:
            raise type(error)(f"{self._name(index)}: {error}") from error

    def _read_rows(self, name: str, shard: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows of a shard; if the local copy of a remote object is damaged or gone, fetch another one."""
        try:
            return open_shard(self.store, self.manifest, self._objects, name, shard).read_rows(start, stop)
        except CacheError:
            if not self.store.discard_copy(self.manifest.arrays[name].object_key(shard)):
                raise
        try:
            return open_shard(self.store, self.manifest, self._objects, name, shard).read_rows(start, stop)
        except CacheError as error:
            raise type(error)(f"fetched twice from {self.store}: {error}") from error

    def _decode(self, arrays: dict[str, npt.NDArray[Any]]) -> CachedSequence:
        settings = self.manifest.settings
        token_ids, mask = arrays.pop("token_ids"), arrays.pop("target_mask").astype(np.bool_)
        if mask[-1:].any():
            raise CacheCorruptError(
                "its mask supervises the last position, which no token follows; run `todi-cache verify`"
            )
        if mask.sum() != (num_targets := len(arrays["label_logprob"])):
            raise CacheCorruptError(
                f"its mask supervises {mask.sum()} positions in {self.store}, but it has {num_targets} targets; run "
                "`todi-cache verify`"
            )
        rows = decode_rows(arrays, settings.encoding, settings.temperatures, settings.tail_temperature)
        return CachedSequence(token_ids, mask, rows)

    def _name(self, index: int) -> str:
        """Return the name of a sequence for messages: its id, read from the table of its shard, and its number."""
        ends = np.cumsum([record.num_sequences for record in self._records])
        number = int(np.searchsorted(ends, index, side="right"))
        try:
            table = read_table(self.store, self._records[number])
        except CacheError:
            return f"sequence {index}"
        return f"sequence {table['id'][index - int(ends[number])].as_py()!r} (number {index})"

    @cached_property
    def sequences(self) -> pa.Table:
        """The sequence table with its texts; read on first use."""
        return pa.concat_tables(at_once(partial(read_table, self.store), self._records))

    def records(self) -> Mapping[int, CommitRecord]:
        """Return the commit records of the open shards, by shard."""
        return {record.shard: record for record in self._records}

    def prepare(self, shard: int) -> None:
        """Fetch the objects of a shard from an object store, so that a later read need not wait; errors are dropped."""
        fetch(self.store, [spec.object_key(shard) for spec in self.manifest.arrays.values()])

    @cached_property
    def bytes_by_array(self) -> Mapping[str, int]:
        """Bytes on disk by array, and of the sequence tables."""
        sums = {"sequences": 0, **dict.fromkeys(self.manifest.arrays, 0)}
        for key, found in self._objects.items():
            sums[key.split("/")[0]] += found.num_bytes
        return sums


def _read_columns(
    store: Store, manifest: Manifest, record: CommitRecord
) -> tuple[ContentKeys, dict[str, npt.NDArray[Any]]]:
    """Return the keys and the numbers of a shard's sequence table."""
    table = read_table(store, record)
    require_places(str(store), table, manifest.settings.shard_tokens, record.shard)
    numbers = {name: np.array(table[name].to_numpy()) for name in _NUMBERS}
    return ContentKeys.from_column(table["content_key"]), numbers


def _joined(
    parts: Iterable[tuple[ContentKeys, dict[str, npt.NDArray[Any]]]],
) -> tuple[ContentKeys, dict[str, npt.NDArray[Any]]]:
    """Join columns one part after the other; many small arrays, kept until the end, would fragment the memory."""
    columns: dict[str, npt.NDArray[Any]] = {}
    keys, length = [], 0
    for part_keys, part in parts:
        length += len(part_keys)
        keys.append(part_keys)
        for name, piece in part.items():
            whole = columns.setdefault(name, np.empty(0, piece.dtype))
            if length > len(whole):
                whole.resize(max(length, len(whole) * 5 // 4), refcheck=False)
            whole[length - len(piece) : length] = piece
    for whole in columns.values():
        whole.resize(length, refcheck=False)
    return ContentKeys.concatenate(keys), columns
