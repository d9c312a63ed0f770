"""A damaged cache in, the same without what is damaged out, so that the capture that wrote it redoes just that."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from todi_offline.cache.check.problems import Problem
from todi_offline.cache.check.verify import object_keys, require_cache, verify_cache
from todi_offline.cache.format.manifest import Part
from todi_offline.cache.format.names import ROOT_KEY, TOKENIZER_KEY, is_own, is_temporary, record_key, shard_of
from todi_offline.cache.format.root import Root
from todi_offline.cache.objects import read_root, read_root_copy
from todi_offline.cache.planning import parts_of
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.store import Store, open_store
from todi_offline.cache.writer import replace_root, write_derived_metadata
from todi_offline.errors import CacheCorruptError, CacheMismatchError


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did, or would do."""

    deleted: tuple[str, ...]
    """The objects that it deleted."""
    renewed: tuple[str, ...]
    """The objects that it wrote again."""
    shards: tuple[int, ...]
    """The shards that it took out of the cache."""
    abandoned: tuple[Part, ...]
    """The captures that had begun to add to the cache and that it gave up."""
    parts: tuple[Part, ...]
    """The captures that are to be run again: they have lost a shard, or are not finished."""
    remaining: tuple[Problem, ...]
    """The problems that nothing here mends."""

    @property
    def is_whole(self) -> bool:
        """Whether the cache is finished as it is now."""
        return not self.parts and not self.remaining


def repair_cache(
    place: str | Path | Store,
    *,
    abandon: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Repair:
    """Take what is damaged out of a cache, so that the same capture again redoes just that; the rest is left as it is.

    Only objects that a cache itself writes are ever deleted: those that `verify_cache` names. A damaged root is
    restored from its copy in `zarr.json`. `abandon` gives up a capture that has begun to add to the cache, with the
    shards that it has committed.

    Raises:
        CacheFormatError: the place holds no cache, or one of an unknown format version.
        CacheLockedError: a capture is writing to it.
        CacheMismatchError: a capture is to be given up, and there is none, or it has begun the cache.
        CacheError: something cannot be read, written or deleted.
    """
    store = open_store(place)
    require_cache(store)
    if dry_run:
        return _plan(store, abandon, progress)[0]
    with store.lock():
        restored = _restore_root(store)
        repair, root = _plan(store, abandon, progress)
        if root is not None:
            _carry_out(store, repair, root)
    return dataclasses.replace(repair, renewed=(ROOT_KEY, *repair.renewed)) if restored else repair


def _restore_root(store: Store) -> bool:
    """Write a damaged or lost root again, where `zarr.json` has a copy of it."""
    try:
        read_root(store)
        return False
    except CacheCorruptError:
        if (copy := read_root_copy(store)) is None:
            return False
    store.write(ROOT_KEY, copy.to_bytes())
    return True


def _plan(store: Store, abandon: bool, progress: Progress) -> tuple[Repair, Root | None]:
    """Return what is to be done, and the root that the cache then has; None where its root cannot be read."""
    problems = verify_cache(store, progress)
    try:
        root = read_root(store)
    except CacheCorruptError:  # verify has named it
        mended = [problem.where for problem in problems if problem.remedy.renews]
        return Repair((), tuple(mended), (), (), (), tuple(p for p in problems if not p.remedy.renews)), None
    abandoned = _abandoned(store, root) if abandon else ()
    shards = sorted({problem.remedy.shard for problem in problems if problem.remedy.shard is not None})
    after = _without(root, shards, abandoned)
    begun = range(len(root.commits), len(root.commits) + sum(part.num_shards for part in abandoned))
    keys = {key for shard in shards for key in (record_key(shard), *object_keys(root, shard))}
    keys |= {key for problem in problems for key in problem.remedy.drop}
    if TOKENIZER_KEY in keys:
        after = dataclasses.replace(after, tokenizer=None)
    found = store.find()
    deleted = {key for key in found if key in keys or (abandoned and shard_of(key) in begun)}
    assert all(is_own(key) or is_temporary(key) for key in deleted), "nothing else is ever deleted"
    lost = [shard for shard in {*shards, *root.lost_shards} if shard < len(after.commits)]
    return (
        Repair(
            deleted=tuple(sorted(deleted, key=lambda key: (not key.startswith("commits/"), key))),
            renewed=tuple(problem.where for problem in problems if problem.remedy.renews),
            shards=tuple(shards),
            abandoned=abandoned,
            parts=(*parts_of(root.manifest.parts, lost), *after.pending),
            remaining=(),
        ),
        after,
    )


def _abandoned(store: Store, root: Root) -> tuple[Part, ...]:
    if not root.pending:
        raise CacheMismatchError(f"{store} has no capture that has begun and not finished; leave out --abandon")
    if not root.commits:
        raise CacheMismatchError(
            f"the capture that is not finished has begun {store}, so nothing would be left; delete the folder instead"
        )
    return root.pending


def _without(root: Root, shards: Sequence[int], abandoned: Sequence[Part]) -> Root:
    commits = tuple(None if shard in shards else commit for shard, commit in enumerate(root.commits))
    return dataclasses.replace(root, commits=commits, pending=() if abandoned else root.pending)


def _carry_out(store: Store, repair: Repair, root: Root) -> None:
    """Take the damaged shards out of the root first, so that at no instant it names what is gone."""
    if root != read_root(store):
        replace_root(store, root)
    for key in repair.deleted:
        store.delete(key)
    if store.size(ROOT_KEY) is not None and root.commits:
        write_derived_metadata(store, root)
