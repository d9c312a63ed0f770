"""Caches in, one cache of all their sequences out, each once; complete shards are linked."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.check.sums import object_difference
from todi_offline.cache.convert.copying import sequence_rows
from todi_offline.cache.fetching import ahead, fetch
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.manifest import Part, identity_differences
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.objects import read_root, read_table, read_tokenizer
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheCorruptError, CacheMismatchError


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """The result of a merge."""

    num_sequences: int
    num_targets: int
    num_shards_linked: int
    num_shards_rewritten: int
    """Shards that had some duplicates."""
    num_duplicates: int
    """Sequences left out because an earlier one has their content."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A shard of a cache, and those of its sequences that are kept."""

    cache: Cache
    record: CommitRecord
    kept: npt.NDArray[np.int64]
    is_whole: bool


def merge_caches(places: Sequence[str], out: str, progress: Progress = no_progress) -> MergeSummary:
    """Write a cache of all sequences of some caches; of sequences with the same content, the first.

    A shard without duplicates is linked, or copied by the object store that holds both caches. A shard with duplicates
    is written anew without them, as a smaller shard. The same call again continues a stopped merge.

    Raises:
        CacheMismatchError: the caches differ in teacher, tokenizer, vocabulary or settings; names the differences.
        CacheError: a cache cannot be read, or `out` cannot be written or holds another cache.
    """
    caches = [open_cache(place) for place in places]
    for cache in caches[1:]:
        _require_alike(cache, caches[0])
    pieces = list(_pieces(caches))
    manifest = dataclasses.replace(caches[0].manifest, parts=tuple(_parts(caches, pieces)))
    tokenizer = read_tokenizer(caches[0].store, read_root(caches[0].store))
    pieces = [piece for piece in pieces if len(piece.kept)]

    def fetched(number: int) -> int:
        fetch(pieces[number].cache.store, pieces[number].record.objects)
        return number

    with CacheWriter(out, manifest, tokenizer) as writer:
        missing = [shard for shard in writer.missing_shards() if shard < len(pieces)]  # later captures own the others
        for done, number in enumerate(ahead([cache.store for cache in caches], fetched, missing)):
            progress(done, len(missing))
            _write(writer, number, pieces[number])
        writer.seal()
        progress(len(missing), len(missing))
    merged = open_cache(out)
    num_linked = sum(piece.is_whole for piece in pieces)
    return MergeSummary(
        num_sequences=len(merged),
        num_targets=int(merged.num_targets.sum()),
        num_shards_linked=num_linked,
        num_shards_rewritten=len(pieces) - num_linked,
        num_duplicates=sum(map(len, caches)) - len(merged),
    )


def _require_alike(cache: Cache, first: Cache) -> None:
    where = (f"in {cache.root}", f"in {first.root}")
    lines = identity_differences(cache.manifest, first.manifest, where)
    if lines:
        raise CacheMismatchError(
            f"{cache.root} and {first.root} cannot be merged: {'; '.join(lines)}; if only settings differ, change them "
            "with `todi-cache subset`, or train from both caches with `todi train --cache A --cache B`"
        )


def _pieces(caches: Sequence[Cache]) -> Iterator[_Piece]:
    """Yield every shard of every cache, with its sequences whose content no earlier sequence has."""
    first = ContentKeys.concatenate(cache.content_keys for cache in caches).is_first()
    start = 0
    for cache in caches:
        kept = first[start : start + len(cache)]
        start += len(cache)
        for shard, record in sorted(cache.members[0].records().items()):
            members = np.flatnonzero(cache.shards == shard)
            yield _Piece(cache, record, members[kept[members]], bool(kept[members].all()))


def _parts(caches: Sequence[Cache], pieces: list[_Piece]) -> Iterator[Part]:
    """Yield the parts of all caches, counting the sequences that are kept."""
    remaining = iter(pieces)
    for cache in caches:
        for part in cache.manifest.parts:
            mine = [piece for piece in (next(remaining) for _ in range(part.num_shards)) if len(piece.kept)]
            if mine:
                num_sequences = sum(len(piece.kept) for piece in mine)
                yield dataclasses.replace(part, num_sequences=num_sequences, num_shards=len(mine))


def _write(writer: CacheWriter, number: int, piece: _Piece) -> None:
    store, record = piece.cache.store, piece.record
    if piece.is_whole:
        for key in record.objects:
            if found := object_difference(store, piece.cache.members[0].manifest, record, key):
                raise CacheCorruptError(
                    f"{store}/{key} cannot be linked: {found.what}; `todi-cache verify {store}` names the remedy"
                )
        writer.link_shard(number, store, record, read_table(store, record))
    else:
        writer.write_shard(number, list(sequence_rows(piece.cache, piece.kept.tolist())))
