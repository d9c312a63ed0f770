"""A data set and what its cache holds already in; what is still to be captured out.

A cache is made of parts, one a capture. The first begins it; a later one appends to the finished cache, in shards of
its own, the sequences whose content no earlier part holds. Nothing that is there is touched until the new shards are
committed. `append.json`, written first, is the `zarr.json` that the cache is to have, and says whose they are.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import Keys, as_keys, differences, locate
from todi_offline.cache.format.layout import record_key
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.records import SEAL_KEY, committed_shards, read_record, read_seal
from todi_offline.cache.plan import ShardPlan, plan_shards
from todi_offline.cache.reader import keys_of, read_manifest, read_table
from todi_offline.cache.store import Store
from todi_offline.config import to_dict
from todi_offline.errors import CacheIncompleteError, CacheMismatchError


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What the capture of a data set makes of a cache."""

    manifest: Manifest
    """Of the cache when the capture is finished."""
    sequences: npt.NDArray[np.int64]
    """Which sequences of the data set the part of this capture has: all that no earlier part holds."""
    shards: list[ShardPlan]
    """Which of `sequences` lie in which shard of the cache."""


def plan_capture(store: Store, fresh: Manifest, keys: Keys, num_tokens: npt.NDArray[np.int64]) -> CapturePlan:
    """Plan the capture of a data set whose sequences have these content keys and lengths.

    `fresh` is the manifest of the cache that it would make by itself; the counts of its only part are found here.
    Where the cache has a part of the same data, it is that part which is gone on with. Content that the data set has
    twice stays twice, unless an earlier part holds it.

    Raises:
        CacheMismatchError: the cache was begun with another teacher, tokenizer or other settings, or the capture of
            other data is not finished.
        CacheIncompleteError: an earlier part has lost a shard.
    """
    if store.size("zarr.json") is None:
        return _plan(fresh, 0, fresh.parts[0], np.arange(len(keys)), num_tokens)
    found, part = read_manifest(store), fresh.parts[0]
    require_begun_alike(store, dataclasses.replace(found, parts=()), dataclasses.replace(fresh, parts=()))
    number = next((number for number, other in enumerate(found.parts) if _data(other) == _data(part)), None)
    if number is None:
        _require_finished(store, found, part)
        number = len(found.parts)
    own = np.flatnonzero(locate(_held(store, found.parts[:number]), keys) < 0)
    if number == len(found.parts) and not len(own):
        return CapturePlan(found, own, [])
    plan = _plan(found, number, part, own, num_tokens)
    is_whole = {shard.index for shard in plan.shards} <= set(committed_shards(store))
    # What is whole is confirmed whatever versions of the libraries made it.
    return dataclasses.replace(plan, manifest=found) if number < len(found.parts) and is_whole else plan


def require_begun_alike(store: Store, found: Manifest | Part, wanted: Manifest | Part) -> None:
    """Refuse to go on with what was begun otherwise."""
    lines = differences(to_dict(found), to_dict(wanted), ("in the cache", "now"))
    if lines:
        raise CacheMismatchError(
            f"{store} was begun otherwise: {'; '.join(lines)}; "
            "go on with the command that began it, or choose another folder"
        )


def is_finished(store: Store, manifest: Manifest) -> bool:
    """Whether the cache is sealed as one of this manifest."""
    return store.size(SEAL_KEY) is not None and read_seal(store).num_shards == manifest.num_shards


def parts_of(manifest: Manifest, shards: Sequence[int]) -> list[Part]:
    """Return the parts that these shards are of."""
    ends = np.cumsum([part.num_shards for part in manifest.parts])
    return [part for number, part in enumerate(manifest.parts) if number in np.searchsorted(ends, shards, "right")]


def described(part: Part) -> str:
    """Return for people what a part was captured from."""
    return ", ".join(f"{name} {value}" for name, value in part.recipe.items() if value is not None)


def _plan(
    found: Manifest, number: int, part: Part, own: npt.NDArray[np.int64], num_tokens: npt.NDArray[np.int64]
) -> CapturePlan:
    """Lay a part's own sequences into shards behind those of the parts before it."""
    first = sum(other.num_shards for other in found.parts[:number])
    shards = plan_shards(num_tokens[own].tolist(), found.settings.shard_tokens)
    part = dataclasses.replace(part, num_sequences=len(own), num_shards=len(shards))
    parts = (*found.parts[:number], part, *found.parts[number + 1 :])
    moved = [dataclasses.replace(shard, index=first + shard.index) for shard in shards]
    return CapturePlan(dataclasses.replace(found, parts=parts), own, moved)


def _data(part: Part) -> tuple[object, str]:
    return part.recipe, part.content


def _require_finished(store: Store, found: Manifest, part: Part) -> None:
    """Refuse to append to a cache that is not finished, and show whose capture is to go on first."""
    if not is_finished(store, found):
        committed, first = set(committed_shards(store)), 0
        for other in found.parts:
            if other is found.parts[-1] or not committed.issuperset(range(first, first + other.num_shards)):
                like = dataclasses.replace(part, num_sequences=other.num_sequences, num_shards=other.num_shards)
                require_begun_alike(store, other, like)
            first += other.num_shards


def _held(store: Store, parts: Iterable[Part]) -> Keys:
    """Return the content keys of all sequences of these parts, the first of a cache."""
    keys: list[Keys] = []
    for part in parts:
        for _ in range(part.num_shards):
            try:
                table = read_table(store, read_record(store, record_key(len(keys))))
            except CacheIncompleteError as error:
                raise CacheIncompleteError(f"{error}; capture {described(part)} again first: it mends that") from error
            keys.append(keys_of(table))
    return np.concatenate([as_keys([]), *keys])
