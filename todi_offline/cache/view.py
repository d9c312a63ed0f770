"""Several caches, or some sequences of one, in; what reads like a single cache out. Nothing is copied.

union     all sequences of several caches, each content once
select    some sequences, in any order
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.format.fingerprint import Keys, differences
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.reader import Cache, CachedSequence
from todi_offline.cache.store import LocalStore, Store
from todi_offline.errors import CacheError, CacheMismatchError


class CacheView:
    """Sequences of caches in an order of their own. Safe to fork and to share between threads, as `Cache` is."""

    def __init__(self, members: Sequence[Cache], manifest: Manifest, places: npt.NDArray[np.int64]) -> None:
        """Use `union` and `select`; `places` count through the sequences of all members."""
        self.members = members
        self.manifest = manifest
        """Its settings say what every row holds; its parts are those of all members."""
        self._places = places
        self._starts = np.cumsum([0, *map(len, members)])
        self._holds_more = [holds(member.manifest.settings) != holds(manifest.settings) for member in members]
        self._alike = len({member.manifest.settings.encoding for member in members}) == 1

    @property
    def root(self) -> str:
        """The places of the members."""
        return ", ".join(member.root for member in self.members)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._places)

    def __iter__(self) -> Iterator[CachedSequence]:
        """Yield the sequences in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> CachedSequence:
        """Read a sequence, narrowed to what all members hold.

        Raises:
            CacheCorruptError, CacheIncompleteError: as `Cache`, naming the member.
        """
        place = int(self._places[range(len(self))[index]])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        member, inside = self.members[number], place - int(self._starts[number])
        try:
            sequence = member[inside]
        except CacheError as error:
            raise type(error)(f"{member.root}: {error}") from error
        rows = sequence.targets
        if self._holds_more[number]:
            rows = narrow(rows, self.manifest.settings, member.content_keys[inside : inside + 1].tobytes())
        if not self._alike:  # of `bf16_logit` alone, and not needed to read rows
            rows = dataclasses.replace(rows, log_partition=None)
        return dataclasses.replace(sequence, targets=rows)

    @cached_property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]:
        """The sequence table but for its text, as of `Cache`; shards are numbered through the members."""
        columns = {name: [member.columns[name] for member in self.members] for name in self.members[0].columns}
        columns["shard"] = [part + first for part, first in zip(columns["shard"], self._first_shards, strict=True)]
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
    def content_keys(self) -> Keys:
        """Content keys of every sequence."""
        return self.columns["content_key"]

    @property
    def shards(self) -> npt.NDArray[np.int64]:
        """The shard of every sequence, numbered through the members."""
        return self.columns["shard"]

    @cached_property
    def sequences(self) -> pa.Table:
        """The sequence table, with its text; places are those within the members."""
        return pa.concat_tables([member.sequences for member in self.members]).take(self._places)

    @property
    def store(self) -> Store:
        """The store of the first member that is no folder, or else of the first: it decides how shards are read."""
        stores = [member.store for member in self.members]
        return next((store for store in stores if not isinstance(store, LocalStore)), stores[0])

    @cached_property
    def bytes_by_array(self) -> Mapping[str, int]:
        """Bytes of all members by array, whatever of them is in the view."""
        sums: dict[str, int] = {}
        for member in self.members:
            for name, num_bytes in member.bytes_by_array.items():
                sums[name] = sums.get(name, 0) + num_bytes
        return sums

    def prepare(self, shard: int) -> None:
        """Fetch a shard; see `Cache`."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        self.members[number].prepare(shard - int(self._first_shards[number]))

    @cached_property
    def _first_shards(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(member.manifest.num_shards for member in self.members[:-1])])


AnyCache = Cache | CacheView


def union(caches: Sequence[Cache], settings: CacheSettings | None = None, *, mix_teachers: bool = False) -> CacheView:
    """Return all sequences of several caches; of those with the same content the first.

    Rows are narrowed to `settings`, or else to what all caches hold: the fewest entries, the temperatures that all
    have, and the fewest tail samples.

    Raises:
        CacheMismatchError: they are of different teachers, tokenizers or vocabularies, have no temperature in common,
            or samples that were drawn at different temperatures; with both values.
    """
    require_alike(caches, mix_teachers=mix_teachers)
    keys = np.concatenate([cache.content_keys for cache in caches])
    places = np.sort(np.unique(keys, return_index=True)[1])
    teachers = [cache.manifest.teacher for cache in caches]
    manifest = dataclasses.replace(
        caches[0].manifest,
        settings=settings or common_settings(caches),
        teacher=teachers[0] if all(teacher == teachers[0] for teacher in teachers) else {"mixed": teachers},
        parts=tuple(part for cache in caches for part in cache.manifest.parts),
    )
    return CacheView(caches, manifest, places)


def select(cache: AnyCache, indices: npt.NDArray[np.int64]) -> CacheView:
    """Return the sequences with these numbers, in this order."""
    if isinstance(cache, Cache):
        return CacheView([cache], cache.manifest, indices)
    return CacheView(cache.members, cache.manifest, cache._places[indices])


def require_alike(caches: Sequence[Cache], *, mix_teachers: bool = False) -> None:
    """Refuse caches of different tokenizers, vocabularies or, unless they are to be mixed, teachers."""
    names = ("tokenizer", "vocab_size") if mix_teachers else ("tokenizer", "vocab_size", "teacher")

    def identity(cache: Cache) -> dict[str, Any]:
        return {name: getattr(cache.manifest, name) for name in names}

    for cache in caches[1:]:
        lines = differences(identity(cache), identity(caches[0]), (f"in {cache.root}", f"in {caches[0].root}"))
        if lines:
            only_teachers = all(line.startswith("teacher.") for line in lines)
            remedy = "mix teachers (--mix-teachers), or use one" if only_teachers else "use one"
            raise CacheMismatchError(
                f"{cache.root} and {caches[0].root} do not belong together: {'; '.join(lines)}; {remedy} of them"
            )


def common_settings(caches: Sequence[Cache]) -> CacheSettings:
    """Return what all caches hold; see `union`."""
    first, *others = (cache.manifest.settings for cache in caches)
    shared = [t for t in first.temperatures if all(t in settings.temperatures for settings in others)]
    samples = min(settings.tail_samples for settings in (first, *others))
    if not shared:
        _require_same(caches, "temperatures")
    if samples:
        _require_same(caches, "tail_temperature")
    k = min(settings.k for settings in (first, *others))
    return dataclasses.replace(first, k=k, temperatures=tuple(shared), tail_samples=samples)


def _require_same(caches: Sequence[Cache], name: str) -> None:
    values = [getattr(cache.manifest.settings, name) for cache in caches]
    if len(set(values)) > 1:
        shown = ", ".join(f"{value} in {cache.root}" for cache, value in zip(caches, values, strict=True))
        raise CacheMismatchError(
            f"the rows of these caches cannot be read alike, their {name} are {shown}; use those of one kind, or "
            "capture again"
        )


def holds(settings: CacheSettings) -> tuple[int, tuple[float, ...], int]:
    """Return what decides the shape of a row: its entries, temperatures and samples."""
    return settings.k, settings.temperatures, settings.tail_samples
