"""A damaged cache in, the cache without its damaged shards out; the capture that wrote them then writes them again."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from todi_offline.cache.check.problems import Problem
from todi_offline.cache.check.verify import examine, expected_metadata, is_version_1, object_keys, require_cache
from todi_offline.cache.fetching import for_each
from todi_offline.cache.format.manifest import Part
from todi_offline.cache.format.names import (
    APPEND_KEY,
    RECORDS_PREFIX,
    ROOT_KEY,
    SEALED_KEY,
    TOKENIZER_KEY,
    is_own,
    is_temporary,
    record_key,
    shard_of,
)
from todi_offline.cache.format.root import Root
from todi_offline.cache.objects import derived_metadata, read_if_there
from todi_offline.cache.planning import parts_of
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.store import Store, open_store
from todi_offline.cache.writer import replace_root
from todi_offline.errors import CacheError, CacheMismatchError


@dataclass(frozen=True, slots=True)
class Repair:
    """The work of a repair: done, or planned in a dry run."""

    deleted: tuple[str, ...] = ()
    """The deleted objects."""
    renewed: tuple[str, ...] = ()
    """The objects that were written again."""
    shards: tuple[int, ...] = ()
    """The shards that were taken out of the cache."""
    abandoned: tuple[Part, ...] = ()
    """The unfinished captures that were given up."""
    parts: tuple[Part, ...] = ()
    """The captures to run again: they have lost a shard, or are not finished."""
    lost: tuple[int, ...] = ()
    """The shards that these captures will write again."""
    remaining: tuple[Problem, ...] = ()
    """The problems that neither a repair nor a capture can mend."""

    @property
    def is_whole(self) -> bool:
        """Whether the cache is now finished and sound."""
        return not self.parts and not self.remaining


@dataclass(frozen=True, slots=True)
class _Plan:
    """A repair, and the objects that it will write."""

    repair: Repair
    root: Root | None = None
    """The new root, if the root changes."""
    metadata: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """The metadata for other readers to write."""
    is_restored: bool = False
    """Whether the present root is damaged or lost."""


def repair_cache(
    place: str | Path | Store,
    *,
    abandon: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Repair:
    """Take the damaged shards out of a cache; the same capture, run again, then writes just these shards.

    A repair deletes only objects of the cache, those that `verify_cache` names; it leaves all other files alone. It
    restores a damaged root from the copy in `zarr.json`. `abandon` gives up an unfinished capture and its committed
    shards. An interrupted repair can be run again, with the same result.

    Raises:
        CacheFormatError: the place holds no cache, or one of an unknown format version.
        CacheLockedError: a capture is writing to the cache.
        CacheMismatchError: the capture to be given up is the one that began the cache.
        CacheError: an object cannot be read, written or deleted.
    """
    store = open_store(place)
    if dry_run:
        return _plan(store, abandon, progress).repair
    require_cache(store)  # before the lock makes a folder
    with store.lock():
        plan = _plan(store, abandon, progress)
        _carry_out(store, plan)
    return plan.repair


def _plan(store: Store, abandon: bool, progress: Progress) -> _Plan:
    """Return the work to do; none if the root is lost."""
    root, problems = examine(store, progress)
    remaining = tuple(problem for problem in problems if problem.remedy.by_hand)
    if root is None:
        return _Plan(Repair(remaining=remaining))
    abandoned = _abandoned(store, root) if abandon else ()
    shards = sorted({problem.remedy.shard for problem in problems if problem.remedy.shard is not None})
    dropped = {key for problem in problems for key in problem.remedy.drop}
    after = _without(root, shards, abandoned, has_tokenizer=TOKENIZER_KEY not in dropped)
    is_damaged = any(problem.where == ROOT_KEY and problem.remedy.renews for problem in problems)
    is_changed = is_damaged or after != root
    metadata = _outdated(store, after, is_changed)
    lost = [shard for shard in sorted({*shards, *root.lost_shards}) if shard < len(after.commits)]
    repair = Repair(
        deleted=_deleted(store, root, shards, abandoned, dropped, is_changed),
        renewed=(*([ROOT_KEY] if is_changed else []), *metadata),
        shards=tuple(shards),
        abandoned=abandoned,
        parts=(*parts_of(root.manifest.parts, lost), *after.pending),
        lost=tuple(lost),
        remaining=remaining,
    )
    return _Plan(repair, after if is_changed else None, metadata, is_damaged)


def _abandoned(store: Store, root: Root) -> tuple[Part, ...]:
    if root.pending and not root.commits:
        raise CacheMismatchError(
            f"the unfinished capture is the only one of {store}, so nothing would be left; delete the folder instead"
        )
    return root.pending


def _without(root: Root, shards: Sequence[int], abandoned: Sequence[Part], *, has_tokenizer: bool) -> Root:
    return dataclasses.replace(
        root,
        commits=tuple(None if shard in shards else commit for shard, commit in enumerate(root.commits)),
        pending=() if abandoned else root.pending,
        tokenizer=root.tokenizer if has_tokenizer else None,
    )


def _deleted(
    store: Store, root: Root, shards: Sequence[int], abandoned: Sequence[Part], dropped: set[str], is_changed: bool
) -> tuple[str, ...]:
    """Return the objects to delete: damaged shards, leftovers, and the shards of abandoned parts."""
    found = set(store.find())
    gone = {*shards, *(shard for shard in root.lost_shards if record_key(shard) not in found)}
    begun = range(len(root.commits), len(root.commits) + sum(part.num_shards for part in abandoned))
    keys = dropped | {key for shard in gone for key in (record_key(shard), *object_keys(root, shard))}
    if is_changed and is_version_1(store):  # the cache becomes one of format 2
        keys |= {SEALED_KEY, APPEND_KEY}
    deleted = {key for key in found if key in keys or ((shard := shard_of(key)) is not None and shard in begun)}
    assert all(is_own(key) or is_temporary(key) for key in deleted), "nothing else is ever deleted"
    return tuple(sorted(deleted, key=lambda key: (not key.startswith(RECORDS_PREFIX), key)))


def _outdated(store: Store, after: Root, is_changed: bool) -> dict[str, bytes]:
    """Return the metadata for other readers that do not follow from the root."""
    if not after.commits:
        return {}
    expected = derived_metadata(after) if is_changed else expected_metadata(store, after)
    return {key: data for key, data in expected.items() if not _holds(store, key, data)}


def _holds(store: Store, key: str, data: bytes) -> bool:
    try:
        return read_if_there(store, key) == data
    except CacheError:
        return False


def _carry_out(store: Store, plan: _Plan) -> None:
    """Delete the records of damaged shards, then change the root, then delete the objects.

    A shard without a record does not exist. So wherever this stops, no capture takes a damaged shard for a whole one.
    Abandoned shards go before the root forgets them, so that a second run still knows them.
    """
    num_shards = len(plan.root.commits) if plan.root is not None else 0
    records, begun, others = list[str](), list[str](), list[str]()
    for key in plan.repair.deleted:
        is_early = key == TOKENIZER_KEY or (shard_of(key) or 0) >= num_shards
        (records if key.startswith(RECORDS_PREFIX) else begun if is_early else others).append(key)
    for keys in (records, begun):
        for_each(store, store.delete, keys)
    if plan.root is not None and plan.is_restored:
        store.write(ROOT_KEY, plan.root.to_bytes())
    elif plan.root is not None:
        replace_root(store, plan.root)
    for_each(store, store.delete, others)
    for key, data in plan.metadata.items():
        store.write(key, data)
