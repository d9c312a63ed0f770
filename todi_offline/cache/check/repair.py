"""A damaged cache in, the same without what is damaged out, so that what wrote it recomputes just that."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from todi_offline.cache.appending import parts_of
from todi_offline.cache.check.verify import (
    Problem,
    Progress,
    difference,
    is_as_sealed,
    manifest_begun,
    object_keys,
    verify_cache,
)
from todi_offline.cache.format.layout import record_key
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.records import SEAL_KEY, read_record
from todi_offline.cache.reader import read_manifest
from todi_offline.cache.store import Store, open_store
from todi_offline.errors import CacheError


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did, or would do."""

    deleted: tuple[str, ...]
    """The objects that it deleted, in this order."""
    shards: tuple[int, ...]
    """The shards that are gone with them."""
    parts: tuple[Part, ...]
    """The captures that these are of."""
    left: tuple[Problem, ...]
    """What is wrong still: what no deletion mends, and what cannot be told for certain as things are."""
    is_sealed: bool
    """Whether the cache is finished as it is: else what wrote it is to be run again."""


def repair_cache(place: str | Path | Store, *, dry_run: bool = False, progress: Progress = lambda *_: None) -> Repair:
    """Delete what is damaged, so that the same capture again recomputes just that; a whole cache is left as it is.

    What is deleted is what `verify_cache` names, and of a damaged shard its record and all its objects. Nothing is
    deleted on the word of something that may be damaged itself: where the manifest is, nothing at all; where no
    whole seal vouches for the manifest, no shard whose bytes are those of its record.

    Raises:
        CacheFormatError: the folder is no cache, or one of another format version.
        CacheLockedError: a capture is writing to it.
        CacheError: something cannot be deleted.
    """
    store = open_store(place)
    try:
        manifest = read_manifest(store)
    except CacheError:  # verify tells a cache whose manifest is lost from a folder that is none
        return Repair((), (), (), tuple(verify_cache(store, progress)), is_sealed=False)
    if dry_run:
        return _plan(store, manifest, verify_cache(store, progress))
    with store.lock():
        repair = _plan(store, manifest, verify_cache(store, progress))
        for key in repair.deleted:
            store.delete(key)
    return repair


def _plan(store: Store, manifest: Manifest, problems: Sequence[Problem]) -> Repair:
    """Decide what is deleted: the seal first, then records, so that at no instant the cache claims what it has not."""
    certain = _certain(store, problems)
    shards = sorted({problem.remedy.shard for problem in certain if problem.remedy.shard is not None})
    begun = manifest_begun(store, manifest)
    first = [SEAL_KEY] if any(_unseals(problem, manifest) for problem in certain) else []
    first += [record_key(shard) for shard in shards]
    others = {key for problem in certain for key in problem.remedy.drop if problem.remedy.shard is None} - {SEAL_KEY}
    others |= {key for shard in shards for key in object_keys(begun, shard)}
    found = set(store.find())
    deleted = tuple(key for key in (*first, *sorted(others)) if key in found)
    return Repair(
        deleted=deleted,
        shards=tuple(shards),
        parts=tuple(parts_of(begun, shards)),
        left=tuple(p for p in problems if p not in certain and (p.remedy.drop or p.where == "zarr.json")),
        is_sealed=SEAL_KEY in found and SEAL_KEY not in deleted,
    )


def _certain(store: Store, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems that may be acted on."""
    where = {problem.where for problem in problems}
    if "zarr.json" in where:
        return []
    blamed = {problem.remedy.shard for problem in problems if problem.remedy.shard is not None}
    is_vouched = is_as_sealed(store, "zarr.json")
    doubted = set[int | None]() if is_vouched else {shard for shard in blamed if _is_as_committed(store, shard)}
    certain = [problem for problem in problems if problem.remedy.shard not in doubted]
    return [problem for problem in certain if not _is_stray(problem)] if SEAL_KEY in where else certain


def _is_stray(problem: Problem) -> bool:
    return problem.remedy.drop == (problem.where,) and problem.where != SEAL_KEY


def _unseals(problem: Problem, manifest: Manifest) -> bool:
    """Whether the seal vouches for what is deleted: not for what is only being appended."""
    shard = problem.remedy.shard
    return SEAL_KEY in problem.remedy.drop and (shard is None or shard < manifest.num_shards)


def _is_as_committed(store: Store, shard: int) -> bool:
    """Whether the bytes of a shard are those of its record, whatever the manifest says of them."""
    try:
        record = read_record(store, record_key(shard))
    except CacheError:
        return False
    return record.shard == shard and not any(difference(store, key, sums) for key, sums in record.objects.items())
