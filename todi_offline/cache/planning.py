"""A data set and the sequences that its cache already holds in; the shards to capture out.

A shard holds `shard_tokens` tokens and as many targets; a sequence never crosses a shard. Sequences keep the order of
the data set, so the plan follows from the lengths alone, and every shard can be captured by itself.

A cache is made of parts, one a capture. The first begins it; a later one adds, in shards of its own, the sequences
whose content no earlier part holds.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.fetching import at_once
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.manifest import Manifest, Part, describe_recipe, identity_differences
from todi_offline.cache.format.root import Root
from todi_offline.cache.objects import has_cache, read_record, read_root, read_table
from todi_offline.cache.store import Store
from todi_offline.errors import CacheIncompleteError, CacheMismatchError, DataError


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The examples `start` to `stop` of a data set lie in shard `index`."""

    index: int
    start: int
    stop: int

    @property
    def examples(self) -> range:
        """Their positions in the data set."""
        return range(self.start, self.stop)


def plan_shards(num_tokens: Sequence[int], shard_tokens: int) -> list[ShardPlan]:
    """Fill shards with examples of these lengths, in order.

    Raises:
        DataError: there is nothing to place, or an example is longer than a shard.
    """
    if not len(num_tokens):
        raise DataError("there is no example to capture: the data set is empty, or all of it was dropped")
    shards: list[ShardPlan] = []
    start = used = 0
    for position, length in enumerate(num_tokens):
        if length > shard_tokens:
            raise DataError(
                f"example {position} has {length} tokens, more than the {shard_tokens} that a shard holds; "
                "lower max_length or raise shard_tokens"
            )
        if used + length > shard_tokens:
            shards.append(ShardPlan(len(shards), start, position))
            start, used = position, 0
        used += int(length)
    return [*shards, ShardPlan(len(shards), start, len(num_tokens))]


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """A cache as the capture of a data set will leave it, and the shards of that capture."""

    manifest: Manifest
    """The manifest of the cache when the capture is finished."""
    sequences: npt.NDArray[np.int64]
    """The numbers, in the data set, of the sequences that this capture adds: those that no earlier part holds."""
    shards: list[ShardPlan]
    """The shards of this capture; their examples count through `sequences`."""


def plan_capture(store: Store, fresh: Manifest, keys: ContentKeys, num_tokens: npt.NDArray[np.int64]) -> CapturePlan:
    """Plan the capture of a data set whose sequences have these content keys and lengths.

    `fresh` is the manifest of a new cache of this data set; this function fills in the counts of its only part. Where
    the cache already has a part of the same data, finished or begun, the plan continues that part. An existing cache
    keeps the size of its shards. Content that occurs twice in the data set stays twice, unless an earlier part has it.

    Raises:
        CacheMismatchError: the cache was begun with another teacher, tokenizer or other settings, or the capture of
            other data is not finished.
        CacheIncompleteError: an earlier part has lost a shard.
    """
    part = fresh.parts[0]
    if not has_cache(store):
        return _plan(fresh, (), part, np.arange(len(keys)), num_tokens)
    root = read_root(store)
    kept = dataclasses.replace(fresh.settings, shard_tokens=root.manifest.settings.shard_tokens)
    require_same_identity(store, root.manifest, dataclasses.replace(fresh, settings=kept))
    number = next((number for number, other in enumerate(root.parts) if _data(other) == _data(part)), None)
    if number is None and root.pending:
        raise CacheMismatchError(
            f"the capture of {describe_part(root.pending[0])} into {store} is not finished; "
            f"run that capture again first, or give it up with `todi-cache repair {store} --abandon`"
        )
    earlier = root.parts[: len(root.parts) if number is None else number]
    own = np.flatnonzero(_held(store, root, earlier).find(keys) < 0)
    if number is None and not len(own):
        return CapturePlan(root.manifest, own, [])
    plan = _plan(root.manifest, earlier, part, own, num_tokens)
    if number is not None and _is_whole(root, number) and len(plan.shards) != root.parts[number].num_shards:
        # An import has laid the same sequences into other shards, and nothing is missing.
        return CapturePlan(dataclasses.replace(root.manifest, parts=root.parts), own, [])
    following = root.parts[len(earlier) + 1 :]
    return dataclasses.replace(
        plan, manifest=dataclasses.replace(plan.manifest, parts=(*plan.manifest.parts, *following))
    )


def require_same_identity(store: Store, found: Manifest, wanted: Manifest) -> None:
    """Refuse to write rows of one teacher, tokenizer, vocabulary or settings into a cache of another.

    Raises:
        CacheMismatchError: the two manifests differ; the message shows every difference.
    """
    lines = identity_differences(found, wanted, ("in the cache", "now"))
    if lines:
        raise CacheMismatchError(
            f"{store} was begun with other settings: {'; '.join(lines)}; repeat the command that began it, or choose "
            "another folder"
        )


def describe_part(part: Part) -> str:
    """Describe the data of a part in words."""
    return describe_recipe(part.recipe)


def parts_of(parts: Sequence[Part], shards: Sequence[int]) -> list[Part]:
    """Return the parts that these shards belong to."""
    ends = np.cumsum([part.num_shards for part in parts])
    return [part for number, part in enumerate(parts) if number in np.searchsorted(ends, shards, "right")]


def _plan(
    found: Manifest, earlier: Sequence[Part], part: Part, own: npt.NDArray[np.int64], num_tokens: npt.NDArray[np.int64]
) -> CapturePlan:
    """Lay a part's own sequences into shards behind those of the parts before it."""
    first = sum(other.num_shards for other in earlier)
    shards = plan_shards(num_tokens[own].tolist(), found.settings.shard_tokens)
    part = dataclasses.replace(part, num_sequences=len(own), num_shards=len(shards))
    moved = [dataclasses.replace(shard, index=first + shard.index) for shard in shards]
    return CapturePlan(dataclasses.replace(found, parts=(*earlier, part)), own, moved)


def _is_whole(root: Root, number: int) -> bool:
    """Whether a part is finished and has lost no shard."""
    first = sum(part.num_shards for part in root.parts[:number])
    stop = first + root.parts[number].num_shards
    return number < len(root.manifest.parts) and not any(first <= shard < stop for shard in root.lost_shards)


def _data(part: Part) -> tuple[object, str]:
    return part.planned.recipe, part.content


def _held(store: Store, root: Root, parts: Sequence[Part]) -> ContentKeys:
    """Return the content keys of all sequences of the first parts of a cache."""

    def keys_of(shard: int, part: Part) -> ContentKeys:
        commit = root.commits[shard] if shard < len(root.commits) else None
        try:
            table = read_table(store, read_record(store, root.manifest, shard, commit))
        except CacheIncompleteError as error:
            what = describe_part(part)
            raise CacheIncompleteError(f"{error}; capture {what} again first: that restores it") from error
        return ContentKeys.from_column(table["content_key"])

    owners = [part for part in parts for _ in range(part.num_shards)]
    return ContentKeys.concatenate(at_once(keys_of, range(len(owners)), owners))
