"""A cache in, its problems out; memory grows with a shard, not with the cache.

Three rounds: the root and the metadata that follow from it; the objects of every shard, against its commit record; and
the contents of the shards (`contents`). Of a shard with a damaged object only the damaged chunks are named. An object
that cannot be read is a problem like any other, and does not end the search.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from todi_offline.cache.check.contents import content_problems
from todi_offline.cache.check.problems import (
    GO_ON,
    NOTHING,
    READ_AGAIN,
    RENEW,
    RESTORE,
    Problem,
    Remedy,
    drop,
    redo,
    remedy_of,
)
from todi_offline.cache.check.sums import Difference, damaged_chunks, difference, object_difference
from todi_offline.cache.fetching import ahead, fetch
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import (
    APPEND_KEY,
    FOLDERS,
    GROUP_KEY,
    RECORDS_PREFIX,
    ROOT_KEY,
    SEALED_KEY,
    TOKENIZER_KEY,
    is_attempt,
    is_own,
    is_temporary,
    record_key,
    sequences_key,
    shard_of,
)
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.root import Root, is_of_other_version
from todi_offline.cache.objects import (
    committed_shards,
    derived_metadata,
    has_cache,
    read_if_there,
    read_note,
    read_record,
    read_root,
    read_root_copy,
    read_table,
)
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.store import Store, open_store
from todi_offline.errors import CacheError, CacheFormatError, CacheIncompleteError

_STABLE_METADATA = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")  # every release of zarr writes these


def verify_cache(place: str | Path | Store, progress: Progress = no_progress) -> list[Problem]:
    """Return all problems of a cache; foreign files in its place are notes.

    Raises:
        CacheFormatError: the place holds no cache, or one of an unknown format version.
        CacheError: the store cannot say whether there is a cache.
    """
    return examine(open_store(place), progress)[1]


def examine(store: Store, progress: Progress = no_progress) -> tuple[Root | None, list[Problem]]:
    """Return the root of a cache and all problems; for a damaged root its copy, or None if there is no copy.

    Raises as `verify_cache`.
    """
    require_cache(store)
    problems: list[Problem] = []
    try:
        root = read_root(store)
    except CacheError as error:
        copy = read_root_copy(store)
        problems.append(_root_problem(store, error, copy))
        if copy is None or problems[0].remedy != RENEW:
            return None, problems
        root = copy
    with np.errstate(all="ignore"):  # stored numbers may be anything
        problems.extend(_problems(store, root, progress))
    return root, problems


def require_cache(store: Store) -> None:
    """Refuse a place that holds no object of a cache."""
    if not has_cache(store) and not committed_shards(store):
        raise CacheFormatError(
            f"{store} is not a cache: it has no {ROOT_KEY}; name the folder that `todi capture` wrote"
        )


def is_version_1(store: Store) -> bool:
    """Whether a cache is of format 1: it has neither a root nor a copy of one."""
    return store.size(ROOT_KEY) is None and read_root_copy(store) is None


def _root_problem(store: Store, error: CacheError, copy: Root | None) -> Problem:
    """Return the problem of a root that cannot be read; raise if it is sound and of another version, or no root."""
    if isinstance(error, CacheFormatError) and copy is None and not committed_shards(store):
        raise error
    where = GROUP_KEY if store.size(ROOT_KEY) is None and copy is None else ROOT_KEY
    remedy = remedy_of(error, RESTORE if copy is None else RENEW)
    if isinstance(error, CacheFormatError) and is_of_other_version(read_if_there(store, ROOT_KEY) or b""):
        raise error
    return Problem(where, str(error), remedy)


def _problems(store: Store, root: Root, progress: Progress) -> Iterator[Problem]:
    rounds = {
        ROOT_KEY: _state_problems(store, root),
        TOKENIZER_KEY: _tokenizer_problems(store, root),
        GROUP_KEY: _metadata_problems(store, root),
        ".": _other_objects(store, root),
        RECORDS_PREFIX: _shards_problems(store, root, progress),
    }
    for where, problems in rounds.items():
        try:
            yield from problems
        except CacheError as error:  # the store cannot list its objects
            yield Problem(where, str(error), READ_AGAIN)


def _state_problems(store: Store, root: Root) -> Iterator[Problem]:
    if root.pending and not root.commits:
        yield Problem(ROOT_KEY, "the capture has not finished", GO_ON)
    elif root.pending:
        yield Problem(ROOT_KEY, "a capture that adds to the cache has not finished", GO_ON, is_note=True)
    for shard in root.lost_shards:
        done = "is captured again but not sealed" if store.size(record_key(shard)) else "is not captured again"
        yield Problem(record_key(shard), f"the shard was lost, and {done} yet", GO_ON)


def _tokenizer_problems(store: Store, root: Root) -> Iterator[Problem]:
    if root.tokenizer is not None and (found := difference(store, TOKENIZER_KEY, root.tokenizer)):
        text = "run `todi-cache repair`, then the same capture again: it writes the tokenizer"
        yield Problem(TOKENIZER_KEY, found.what, _unless_unreadable(found, Remedy(text, drop=(TOKENIZER_KEY,))))


def _unless_unreadable(found: Difference, remedy: Remedy) -> Remedy:
    return READ_AGAIN if found.is_unreadable else remedy


def _metadata_problems(store: Store, root: Root) -> Iterator[Problem]:
    """Compare the metadata for other readers with those that follow from the root."""
    if not root.commits:  # it is written when the cache is sealed
        return
    for key, expected in expected_metadata(store, root).items():
        try:
            found = read_if_there(store, key)
        except CacheError as error:
            yield Problem(key, str(error), remedy_of(error, RENEW))
            continue
        if found is None:
            yield Problem(key, "it is missing", RENEW)
        elif found != expected and not _says_the_same(found, expected):
            yield Problem(key, "it differs from the metadata that the root gives", RENEW)
        elif found != expected:
            yield Problem(key, "this release of zarr-python writes it differently", RENEW, is_note=True)


def expected_metadata(store: Store, root: Root) -> dict[str, bytes]:
    """Return the metadata for other readers that follow from the root; for format 1 only those of the arrays."""
    metadata = dict(derived_metadata(root))
    if is_version_1(store):
        del metadata[GROUP_KEY]  # there it holds the manifest
    return metadata


def _says_the_same(found: bytes, expected: bytes) -> bool:
    """Whether metadata differ only in fields that releases of zarr-python add or leave out."""
    try:
        mine, wanted = json.loads(found), json.loads(expected)
        if wanted["node_type"] == "group":
            return bool(mine == wanted)
        shared = mine.keys() & wanted.keys()
        return shared.issuperset(_STABLE_METADATA) and all(mine[name] == wanted[name] for name in shared)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _other_objects(store: Store, root: Root) -> Iterator[Problem]:
    """Yield a note on every object that belongs neither to the cache nor to an unfinished capture."""
    num_shards, foreign = sum(part.num_shards for part in root.parts), set[str]()
    old = () if is_version_1(store) else (SEALED_KEY, APPEND_KEY)
    for key in store.find():
        shard = shard_of(key)
        is_named = shard is None or (shard < num_shards and key in {record_key(shard), *object_keys(root, shard)})
        if shard is not None and is_attempt(key):
            yield from _note_problems(store, key, shard, is_planned=shard < num_shards)
        elif is_temporary(key):
            yield Problem(key, "a writer that was stopped left this temporary file", drop(key), is_note=True)
        elif is_own(key) and (not is_named or key in old):
            yield Problem(key, "no commit record names this object", drop(key), is_note=True)
        elif not is_own(key):
            folder = key.partition("/")[0]
            foreign.add(key if folder in FOLDERS else folder)
    for name in sorted(foreign):
        yield Problem(name, "it is not part of the cache and stays unchanged", NOTHING, is_note=True)


def _note_problems(store: Store, key: str, shard: int, *, is_planned: bool) -> Iterator[Problem]:
    """Describe the note on an attempt at a shard; a capture goes on with a sound one and refuses any other."""
    if not is_planned or store.size(record_key(shard)) is not None:
        yield Problem(key, "this note is on an attempt that has ended", drop(key), is_note=True)
        return
    try:
        read_note(store, shard)
    except CacheIncompleteError:  # a capture that runs has just committed the shard
        return
    except CacheError as error:
        yield Problem(key, str(error), remedy_of(error, drop(key)))
    else:
        yield Problem(key, "a capture has begun this shard and has not committed it", GO_ON, is_note=True)


def _shards_problems(store: Store, root: Root, progress: Progress) -> Iterator[Problem]:
    """Check every shard that the root names, and the shards that a capture has committed since."""
    shards: dict[int, ObjectSum | None] = {n: commit for n, commit in enumerate(root.commits) if commit is not None}
    num_shards = sum(part.num_shards for part in root.parts)
    try:
        begun = [shard for shard in committed_shards(store) if shard < num_shards and shard not in shards]
    except CacheError as error:
        yield Problem(RECORDS_PREFIX, str(error), READ_AGAIN)
        begun = []
    shards |= dict.fromkeys(begun)
    records = ahead([store], partial(_fetched_record, store, root.manifest), shards.items())
    for done, (shard, record) in enumerate(zip(shards, records, strict=True)):
        progress(done, len(shards))
        if isinstance(record, CacheError):
            yield Problem(record_key(shard), str(record), remedy_of(record, redo(shard)))
        else:
            yield from _shard_problems(store, root.manifest, record)
    progress(len(shards), len(shards))


def _fetched_record(
    store: Store, manifest: Manifest, commit: tuple[int, ObjectSum | None]
) -> CommitRecord | CacheError:
    """Return the commit record of a shard, or the reason why there is none; fetch the objects that it names."""
    try:
        record = read_record(store, manifest, *commit)
    except CacheError as error:
        return error
    fetch(store, record.objects)
    return record


def _shard_problems(store: Store, manifest: Manifest, record: CommitRecord) -> Iterator[Problem]:
    remedy = redo(record.shard)
    differing = {
        key: found for key in record.objects if (found := object_difference(store, manifest, record, key)) is not None
    }
    try:
        table = None if sequences_key(record.shard) in differing else read_table(store, record)
    except CacheError as error:
        yield Problem(sequences_key(record.shard), str(error), remedy_of(error, remedy))
        return
    for key, found in differing.items():
        chunks = "" if found.is_unreadable else damaged_chunks(store, manifest, record, key, table)
        yield Problem(key, found.what + chunks, _unless_unreadable(found, remedy))
    if table is None or differing:
        return
    try:
        yield from content_problems(store, manifest, table, record)
    except CacheError as error:  # bytes with right checksums that do not decode, or a failing disk
        yield Problem(f"shard {record.shard}", str(error), remedy_of(error, remedy))


def object_keys(root: Root, shard: int) -> set[str]:
    """Return the objects of a shard, its commit record apart."""
    return {sequences_key(shard), *(spec.object_key(shard) for spec in root.manifest.arrays.values())}
