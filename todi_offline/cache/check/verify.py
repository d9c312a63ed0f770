"""A cache in, everything that is wrong with it out; memory grows with a shard, not with the cache.

Three rounds: the root and what follows from it, the objects of every shard (as their records describe them), and what
the shards hold (`contents`). A shard with a damaged object is not looked into further than to say which of its chunks
are damaged.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from todi_offline.cache.check.contents import content_problems
from todi_offline.cache.check.problems import NOTHING, Problem, Remedy, redo
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import (
    ROOT_KEY,
    TOKENIZER_KEY,
    is_own,
    is_temporary,
    record_key,
    sequences_key,
    shard_of,
)
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.root import Root
from todi_offline.cache.objects import (
    committed_shards,
    derived_metadata,
    has_cache,
    open_shard,
    read_if_there,
    read_record,
    read_root,
    read_root_copy,
    read_table,
)
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.store import Store, open_store
from todi_offline.errors import CacheError, CacheFormatError

_BLOCK_BYTES = 2**22
_STABLE_METADATA = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")  # zarr may add others


_GO_ON = Remedy("run the same capture again: it goes on")
_RESTORE = Remedy("bring it back from a copy, or capture into another folder")
_RENEW = Remedy("`todi-cache repair` writes it again", renews=True)


def verify_cache(place: str | Path | Store, progress: Progress = no_progress) -> list[Problem]:
    """Return everything that is wrong with a cache, and what lies in its place and is none of its objects.

    Raises:
        CacheFormatError: the place holds no cache, or one of an unknown format version.
    """
    with np.errstate(all="ignore"):  # whatever is stored is looked at
        return list(_problems(open_store(place), progress))


def _problems(store: Store, progress: Progress) -> Iterator[Problem]:
    if not has_cache(store) and not committed_shards(store):
        raise CacheFormatError(
            f"{store} is not a cache: it has no {ROOT_KEY}; name the folder that `todi capture` wrote"
        )
    try:
        root = read_root(store)
    except CacheError as error:
        is_unknown = isinstance(error, CacheFormatError) and not committed_shards(store)
        if is_unknown:
            raise
        yield Problem(ROOT_KEY, str(error), _RENEW if read_root_copy(store) is not None else _RESTORE)
        return
    yield from _state_problems(root)
    yield from _metadata_problems(store, root)
    yield from _other_objects(store, root)
    yield from _shards_problems(store, root, progress)


def require_cache(store: Store) -> None:
    """Refuse a place where there is nothing of a cache."""
    if not has_cache(store) and not committed_shards(store):
        raise CacheFormatError(f"{store} is not a cache: it has no {ROOT_KEY}; name what `todi capture` wrote")


def _state_problems(root: Root) -> Iterator[Problem]:
    if root.pending and not root.commits:
        yield Problem(ROOT_KEY, "the capture has not finished", _GO_ON)
    elif root.pending:
        yield Problem(ROOT_KEY, "a capture has begun to add to the cache, and has not finished", _GO_ON, is_note=True)
    for shard in root.lost_shards:
        yield Problem(record_key(shard), "the shard was lost, and is not captured again yet", _GO_ON)


def _metadata_problems(store: Store, root: Root) -> Iterator[Problem]:
    """Compare the tokenizer with its sum, and the metadata for other readers with what follows from the root."""
    if root.tokenizer is not None and (what := difference(store, TOKENIZER_KEY, root.tokenizer)):
        remedy = Remedy("`todi-cache repair`, then the same capture again: it writes it anew", (TOKENIZER_KEY,))
        yield Problem(TOKENIZER_KEY, what, remedy)
    if store.size(ROOT_KEY) is None or not root.commits:  # of format 1, or not written yet
        return
    for key, expected in derived_metadata(root).items():
        try:
            found = read_if_there(store, key)
        except CacheError as error:
            yield Problem(key, f"it cannot be read: {error}", _RENEW)
            continue
        if found is None:
            yield Problem(key, "it is missing", _RENEW)
        elif found != expected and _stable(found) != _stable(expected):
            yield Problem(key, "it is not what the root leads to", _RENEW)


def _stable(metadata: bytes) -> list[Any] | None:
    """Return the values that no release of zarr-python writes otherwise: of an array, or of the group."""
    try:
        values = json.loads(metadata)
        names = ["attributes"] if values["node_type"] == "group" else _STABLE_METADATA
        return [values[name] for name in names]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _other_objects(store: Store, root: Root) -> Iterator[Problem]:
    """Yield a note on whatever lies there and belongs neither to the cache nor to a capture that goes on."""
    num_shards, foreign = sum(part.num_shards for part in root.parts), set[str]()
    for key in store.find():
        shard = shard_of(key)
        is_named = shard is None or (shard < num_shards and key in {record_key(shard), *object_keys(root, shard)})
        if is_temporary(key) or (is_own(key) and not is_named):
            remedy = Remedy("`todi-cache repair` deletes it", (key,))
            yield Problem(key, "no commit record names it", remedy, is_note=True)
        elif not is_own(key):
            foreign.add(key.partition("/")[0])
    for name in sorted(foreign):
        yield Problem(name, "it is not part of the cache, and is left alone", NOTHING, is_note=True)


def _shards_problems(store: Store, root: Root, progress: Progress) -> Iterator[Problem]:
    """Look into every shard that is committed."""
    named = {shard: commit for shard, commit in enumerate(root.commits) if commit is not None}
    begun = [shard for shard in committed_shards(store) if shard not in named] if root.pending else []
    shards: dict[int, ObjectSum | None] = {**named, **dict.fromkeys(begun)}
    for done, (shard, commit) in enumerate(shards.items()):
        progress(done, len(shards))
        try:
            record = read_record(store, root.manifest, shard, commit)
        except CacheError as error:
            yield Problem(record_key(shard), str(error), redo(shard))
            continue
        yield from _shard_problems(store, root.manifest, record)
    progress(len(shards), len(shards))


def _shard_problems(store: Store, manifest: Manifest, record: CommitRecord) -> Iterator[Problem]:
    shard = record.shard
    damaged = {
        key: what
        for key, sums in record.objects.items()
        if (what := difference(store, key, sums) or _exchange(store, manifest, record, key))
    }
    try:
        table = None if sequences_key(shard) in damaged else read_table(store, record)
        for key, what in damaged.items():
            yield Problem(key, what + _damaged_chunks(store, manifest, record, key, table), redo(shard))
        if table is not None and not damaged:
            yield from content_problems(store, manifest, table, record)
    except (CacheError, OSError) as error:  # right checksums over what cannot be read; or the disk fails
        yield Problem(f"shard {shard}", f"it cannot be read: {error}", redo(shard))


def _exchange(store: Store, manifest: Manifest, record: CommitRecord, key: str) -> str | None:
    """Return how the chunks of an object of the right size and sum differ from those that were written."""
    name = key.partition("/")[0]
    if name not in manifest.arrays:
        return None
    try:
        found = open_shard(store, manifest, record.objects, name, record.shard).read_sums()
    except CacheError as error:
        return str(error)
    is_same = found == record.objects[key].chunks
    return None if is_same else "the chunks are intact but are not the ones that this commit record describes"


def _damaged_chunks(store: Store, manifest: Manifest, record: CommitRecord, key: str, table: pa.Table | None) -> str:
    """Return which chunks of a damaged object are damaged, and whose; nothing where that cannot be told."""
    spec = manifest.arrays.get(key.partition("/")[0])
    if spec is None or store.size(key) is None:
        return ""
    file, chunks = open_shard(store, manifest, record.objects, spec.name, record.shard), []
    try:
        file.read_sums()
    except CacheError:
        return "; its chunk index is lost"
    for chunk in range(len(record.objects[key].chunks) // 4):
        try:
            file.read_chunk(chunk)
        except CacheError:
            chunks.append(chunk)
    if table is None or not chunks:
        return f"; damaged are the chunks {chunks}" if chunks else ""
    ends = table[f"{spec.axis}_start"].to_numpy() + table[f"num_{spec.axis}s"].to_numpy()
    first = record.shard * manifest.settings.shard_tokens + np.array(chunks) * spec.chunk_rows
    touched = (
        (table[f"{spec.axis}_start"].to_numpy() < first[:, None] + spec.chunk_rows) & (ends > first[:, None])
    ).any(0)
    names = table["id"].filter(pa.array(touched)).to_pylist()
    shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"; damaged are the chunks {chunks}, of the sequences {shown or 'none'}"


def object_keys(root: Root, shard: int) -> set[str]:
    """Return the objects of a shard, its commit record apart."""
    return {sequences_key(shard), *(spec.object_key(shard) for spec in root.manifest.arrays.values())}


def difference(store: Store, key: str, expected: ObjectSum) -> str | None:
    """Return how an object differs from what was written, or why it cannot be read."""
    found = _difference_here(store, key, expected)
    return _difference_here(store, key, expected) if found and store.discard_copy(key) else found


def _difference_here(store: Store, key: str, expected: ObjectSum) -> str | None:
    """Return how an object, or the local copy of it, differs from what was written, reading it in blocks."""
    try:
        path = store.local(key)
        num_bytes, crc = path.stat().st_size, 0
        if num_bytes != expected.num_bytes or not path.is_file():  # a pipe or a device may have no end
            return f"it has {num_bytes} bytes, expected {expected.num_bytes}"
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc = google_crc32c.extend(crc, block)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except CacheError as error:
        return f"it cannot be read: {error}"
    if crc == expected.crc32c:
        return None
    return f"it has {num_bytes} bytes with crc32c {crc:08x}, expected {expected.crc32c:08x}"
