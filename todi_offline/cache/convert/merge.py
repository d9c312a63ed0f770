"""Caches in, one cache that holds the sequences of all out, each once; shards are linked where nothing is left out."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import as_keys, differences, locate
from todi_offline.cache.format.layout import TOKENIZER_KEY
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.reader import Cache, open_cache, read_shard_record, read_table
from todi_offline.cache.writer import CacheWriter, SequenceRows
from todi_offline.errors import CacheMismatchError

Progress = Callable[[int, int], None]
"""Called with the shards written so far and all that are to be."""


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a merge did."""

    num_sequences: int
    num_targets: int
    num_shards_linked: int
    num_shards_rewritten: int
    """Shards of which a part was there already."""
    num_duplicates: int
    """Sequences left out because an earlier one has their content."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A shard of a cache, and the sequences of it that are kept."""

    cache: Cache
    shard: int
    kept: npt.NDArray[np.int64]
    is_whole: bool


def merge_caches(places: Sequence[str], out: str, progress: Progress = lambda *_: None) -> MergeSummary:
    """Write a cache of all sequences of some caches; of those with the same content, the first.

    A shard that is kept whole is linked, or copied by the object store that holds both; of another one what is kept
    is written anew, as a smaller shard. The same call again goes on where it was stopped.

    Raises:
        CacheMismatchError: they differ in teacher, tokenizer, vocabulary or settings; says in what.
        CacheError: one cannot be read, or `out` cannot be written or holds something else.
    """
    caches = [open_cache(place) for place in places]
    for cache in caches[1:]:
        _require_alike(cache, caches[0])
    pieces = list(_pieces(caches))
    manifest = dataclasses.replace(caches[0].manifest, parts=tuple(_parts(caches, pieces)))
    first = caches[0].store
    tokenizer = first.read(TOKENIZER_KEY).decode() if first.size(TOKENIZER_KEY) is not None else None
    pieces = [piece for piece in pieces if len(piece.kept)]
    with CacheWriter(out, manifest, tokenizer) as writer:
        missing = writer.missing_shards()
        for done, number in enumerate(missing):
            progress(done, len(missing))
            _write(writer, number, pieces[number])
        if not writer.sealed:
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
    def identity(manifest: Manifest) -> dict[str, object]:
        values = manifest.to_json()
        return {name: values[name] for name in ("teacher", "tokenizer", "vocab_size", "settings")}

    lines = differences(identity(cache.manifest), identity(first.manifest), (f"in {cache.root}", f"in {first.root}"))
    if lines:
        raise CacheMismatchError(
            f"{cache.root} and {first.root} cannot become one cache: {'; '.join(lines)}; where only settings differ, "
            "`todi-cache subset` writes a cache with other ones, and `todi train --cache A --cache B` takes both as "
            "they are"
        )


def _pieces(caches: Sequence[Cache]) -> Iterator[_Piece]:
    """Yield every shard of every cache with what is kept of it: what no earlier sequence has the content of."""
    keys = as_keys(key for cache in caches for key in cache.content_keys.tolist())
    first = locate(keys, keys) == np.arange(len(keys))
    start = 0
    for cache in caches:
        kept = first[start : start + len(cache)]
        start += len(cache)
        for shard in range(cache.manifest.num_shards):
            members = np.flatnonzero(cache.shards == shard)
            yield _Piece(cache, shard, members[kept[members]], bool(kept[members].all()))


def _parts(caches: Sequence[Cache], pieces: list[_Piece]) -> Iterator[Part]:
    """Yield the parts of all caches, with what is kept of each."""
    remaining = iter(pieces)
    for cache in caches:
        for part in cache.manifest.parts:
            mine = [piece for piece in (next(remaining) for _ in range(part.num_shards)) if len(piece.kept)]
            if mine:
                num_sequences = sum(len(piece.kept) for piece in mine)
                yield dataclasses.replace(part, num_sequences=num_sequences, num_shards=len(mine))


def _write(writer: CacheWriter, number: int, piece: _Piece) -> None:
    record = read_shard_record(piece.cache.store, piece.cache.manifest, piece.shard)
    table = read_table(piece.cache.store, record)
    if piece.is_whole:
        writer.link_shard(number, piece.cache.store, record, table)
        return
    first = int(np.flatnonzero(piece.cache.shards == piece.shard)[0])
    names = {index: [table[name][int(index) - first].as_py() for name in ("id", "source")] for index in piece.kept}
    rows = []
    for index, (name, source) in names.items():
        sequence = piece.cache[int(index)]
        rows.append(SequenceRows(name, source, sequence.token_ids, sequence.target_mask, sequence.targets))
    writer.write_shard(number, rows)
