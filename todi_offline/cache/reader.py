"""Caches in, their sequences out, in any order: all sequences of one or several caches, or some. Nothing is copied.

open_cache  one cache
union       all sequences of several caches, each content once
select      some sequences, in any order
read_all    the rows of some sequences, one after the other
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.fetching import ahead
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, identity_differences
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.store import LocalStore, Store, open_store
from todi_offline.cache.stored import StoredCache, open_stored
from todi_offline.errors import CacheError, CacheMismatchError


def open_cache(place: str | Path | Store, *, allow_unsealed: bool = False) -> "Cache":
    """Open a cache for reading. An open cache does not change, even if a capture adds to it.

    With `allow_unsealed` an unfinished cache opens too: its committed shards are read.

    Raises:
        CacheFormatError: the folder is no cache, or its format version is unknown.
        CacheIncompleteError: the cache is not finished, or an object is missing.
        CacheCorruptError: the root, a record or a sequence table has changed since it was written.
    """
    stored = open_stored(open_store(place), allow_unsealed=allow_unsealed)
    return Cache([stored], stored.manifest, np.arange(len(stored)))


class Cache:
    """A sequence of `CachedSequence`. Holds no open file, so it may be forked and shared between threads."""

    def __init__(self, members: Sequence[StoredCache], manifest: Manifest, places: npt.NDArray[np.int64]) -> None:
        """Use `open_cache`, `union` and `select`; `places` count through the sequences of all members."""
        self.members = members
        self.manifest = manifest
        """The settings hold for every row; the parts are those of all members."""
        self._places = places
        self._starts = np.cumsum([0, *map(len, members)])
        self._holds_more = [holds(member.manifest.settings) != holds(manifest.settings) for member in members]
        self._is_alike = len({member.manifest.settings.encoding for member in members}) == 1

    @property
    def root(self) -> str:
        """The places of the members."""
        return ", ".join(str(member.store) for member in self.members)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._places)

    def __iter__(self) -> Iterator[CachedSequence]:
        """Yield the sequences in order."""
        return read_all(self, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> CachedSequence: ...
    @overload
    def __getitem__(self, index: slice) -> "Cache": ...
    def __getitem__(self, index: int | slice) -> "CachedSequence | Cache":
        """Read a sequence, narrowed to the settings of this cache; or, for a slice, return a cache of these sequences.

        Raises:
            CacheCorruptError, CacheIncompleteError: naming member, sequence, file and chunk.
        """
        if isinstance(index, slice):
            return select(self, np.arange(len(self))[index])
        place = int(self._places[range(len(self))[index]])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        member, inside = self.members[number], place - int(self._starts[number])
        try:
            sequence = member.read(inside)
        except CacheError as error:
            raise type(error)(f"{member.store}: {error}") from error
        rows = sequence.targets
        if self._holds_more[number]:
            rows = narrow(rows, self.manifest.settings, member.content_keys[inside])
        if not self._is_alike:  # only `bf16_logit` has it, and reading rows needs it no more
            rows = dataclasses.replace(rows, log_partition=None)
        return dataclasses.replace(sequence, targets=rows)

    @cached_property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]:
        """The numbers of the sequence table, [sequence] each; shards are numbered through the members."""
        columns = {name: [member.columns[name] for member in self.members] for name in self.members[0].columns}
        columns["shard"] = [part + first for part, first in zip(columns["shard"], self._first_shards, strict=True)]
        if self._is_whole:
            return {name: parts[0] for name, parts in columns.items()}
        return {name: np.concatenate(parts)[self._places] for name, parts in columns.items()}

    @property
    def num_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of every sequence."""
        return self.columns["num_tokens"]

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """Targets of every sequence."""
        return self.columns["num_targets"]

    @property
    def shards(self) -> npt.NDArray[np.int64]:
        """The shard of every sequence, numbered through the members."""
        return self.columns["shard"]

    @cached_property
    def content_keys(self) -> ContentKeys:
        """The content key of every sequence."""
        if self._is_whole:
            return self.members[0].content_keys
        return ContentKeys.concatenate(member.content_keys for member in self.members)[self._places]

    @cached_property
    def sequences(self) -> pa.Table:
        """The sequence table with its texts; `shard` and starts count within each member."""
        if self._is_whole:
            return self.members[0].sequences
        return pa.concat_tables([member.sequences for member in self.members]).take(self._places)

    @property
    def store(self) -> Store:
        """The store of the first remote member, or of the first member; it decides in which order shards are read."""
        stores = [member.store for member in self.members]
        return next((store for store in stores if not isinstance(store, LocalStore)), stores[0])

    @cached_property
    def bytes_by_array(self) -> Mapping[str, int]:
        """Bytes of all members by array; sequences that are left out count too."""
        sums: dict[str, int] = {}
        for member in self.members:
            for name, num_bytes in member.bytes_by_array.items():
                sums[name] = sums.get(name, 0) + num_bytes
        return sums

    def prepare(self, shard: int) -> None:
        """Fetch the objects of a shard from an object store, so that a later read need not wait; errors are dropped."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        self.members[number].prepare(shard - int(self._first_shards[number]))

    @property
    def _is_whole(self) -> bool:
        """Whether the cache is all of one member, in order; then its table need not be copied."""
        return len(self.members) == 1 and np.array_equal(self._places, np.arange(len(self.members[0])))

    @cached_property
    def _first_shards(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(int(member.columns["shard"].max()) + 1 for member in self.members[:-1])])


def union(caches: Sequence[Cache], settings: CacheSettings | None = None, *, mix_teachers: bool = False) -> Cache:
    """Return all sequences of several caches; of sequences with the same content, the first.

    Rows are narrowed to `settings`, by default to the most that all caches hold: the fewest entries, the common
    temperatures, and the fewest tail samples.

    Raises:
        CacheMismatchError: they are of different teachers, tokenizers or vocabularies, have no temperature in common,
            samples that were drawn at different temperatures, or neither entries nor samples in common; with both
            values.
    """
    require_alike(caches, mix_teachers=mix_teachers)
    members = [member for cache in caches for member in cache.members]
    starts = np.cumsum([0, *(sum(map(len, cache.members)) for cache in caches)])
    places = np.concatenate([cache._places + start for cache, start in zip(caches, starts, strict=False)])
    is_first = ContentKeys.concatenate(cache.content_keys for cache in caches).is_first()
    teachers = [cache.manifest.teacher for cache in caches]
    manifest = dataclasses.replace(
        caches[0].manifest,
        settings=settings or common_settings(caches),
        teacher=teachers[0] if all(teacher == teachers[0] for teacher in teachers) else {"mixed": teachers},
        parts=tuple(part for cache in caches for part in cache.manifest.parts),
    )
    return Cache(members, manifest, places[is_first])


def select(cache: Cache, indices: npt.NDArray[np.int64]) -> Cache:
    """Return the sequences with these numbers, in this order."""
    return Cache(cache.members, cache.manifest, cache._places[indices])


def read_all(cache: Cache, indices: Iterable[int]) -> Iterator[CachedSequence]:
    """Yield the sequences with these numbers, in this order; while a shard is read, the next ones are fetched.

    Raises as `Cache.__getitem__`.
    """
    shards = cache.shards
    runs = (list(run) for _, run in groupby(indices, key=lambda index: shards[index]))

    known = set[int]()  # in an order that returns to shards again and again, each is fetched ahead once

    def fetched(run: list[int]) -> list[int]:
        if (shard := int(shards[run[0]])) not in known:
            known.add(shard)
            cache.prepare(shard)
        return run

    for run in ahead([cache.store], fetched, runs):
        yield from (cache[index] for index in run)


def require_alike(caches: Sequence[Cache], *, mix_teachers: bool = False) -> None:
    """Refuse caches of different tokenizers or vocabularies and, unless `mix_teachers`, of different teachers."""
    names = ("tokenizer", "vocab_size") if mix_teachers else ("tokenizer", "vocab_size", "teacher")
    for cache in caches[1:]:
        where = (f"in {cache.root}", f"in {caches[0].root}")
        lines = identity_differences(cache.manifest, caches[0].manifest, where, names)
        if lines:
            only_teachers = all(line.startswith("teacher.") for line in lines)
            remedy = "mix teachers (--mix-teachers), or use one" if only_teachers else "use one"
            raise CacheMismatchError(
                f"{cache.root} and {caches[0].root} do not belong together: {'; '.join(lines)}; {remedy} of them"
            )


def common_settings(caches: Sequence[Cache]) -> CacheSettings:
    """Return the settings of the rows that all caches can give; see `union`."""
    first, *others = (cache.manifest.settings for cache in caches)
    shared = [t for t in first.temperatures if all(t in settings.temperatures for settings in others)]
    samples = min(settings.tail_samples for settings in (first, *others))
    if not shared:
        _require_same(caches, "temperatures")
    if samples:
        _require_same(caches, "tail_temperature")
    k = min(settings.k for settings in (first, *others))
    if not k and not samples:  # one cache has samples alone, another one entries alone
        _require_same(caches, "tail_samples")
    return dataclasses.replace(first, k=k, temperatures=tuple(shared), tail_samples=samples)


def _require_same(caches: Sequence[Cache], name: str) -> None:
    values = [getattr(cache.manifest.settings, name) for cache in caches]
    if len(set(values)) > 1:
        shown = ", ".join(f"{value} in {cache.root}" for cache, value in zip(caches, values, strict=True))
        raise CacheMismatchError(
            f"these caches cannot be read as one: their {name} are {shown}; use caches that agree, or capture again"
        )


def holds(settings: CacheSettings) -> tuple[int, tuple[float, ...], int]:
    """Return the settings that decide the shape of a row: entries, temperatures and samples."""
    return settings.k, settings.temperatures, settings.tail_samples
