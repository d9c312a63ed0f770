"""A manifest and rows in, a cache out: takes the lock, begins the cache, and seals it when all shards are written.

with CacheWriter(place, manifest) as writer:      # begins the cache, or continues it
    for shard in writer.missing_shards():
        writer.write_shard(shard, rows)           # or, in any process: writer.shards.write(shard, rows)
    writer.seal()

The root is written twice: at the beginning, with the new parts as pending, and at the seal, with all shards in it.
Until the seal a reader finds the old cache.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

import pyarrow as pa

from todi_offline.cache.fetching import at_once, for_each
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.names import (
    APPEND_KEY,
    ROOT_KEY,
    SEALED_KEY,
    TOKENIZER_KEY,
    is_own,
    is_temporary,
    record_key,
    sequences_key,
)
from todi_offline.cache.format.notes import Note
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.root import Root
from todi_offline.cache.format.sequences import SequenceRows, left_out_of
from todi_offline.cache.objects import (
    committed_shards,
    derived_metadata,
    has_cache,
    noted_shards,
    read_if_there,
    read_note,
    read_object,
    read_record,
    read_root,
)
from todi_offline.cache.planning import describe_part, parts_of, require_same_identity
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.cache.store import LocalStore, Store, open_store
from todi_offline.cache.store.base import Lock
from todi_offline.cache.store.locks import naming_successor, require_held
from todi_offline.errors import CacheError, CacheIncompleteError, CacheLockedError, CacheMismatchError


class CacheWriter:
    """The place of a cache, locked for writing."""

    def __init__(self, place: str | Path | Store, manifest: Manifest, tokenizer_json: str | None = None) -> None:
        """Name the place and the manifest of the finished cache; `tokenizer_json` lets the tools show text."""
        self.store = open_store(place)
        self.manifest = manifest
        self._tokenizer_json = tokenizer_json
        self._locked = contextlib.ExitStack()
        self._lock: Lock | None = None
        self._root = Root(manifest=manifest)
        self._noted: list[int] = []

    def __enter__(self) -> "CacheWriter":
        """Lock the place; begin the cache, or check that the cache there is the one to continue.

        Raises:
            CacheLockedError: another process writes to the place.
            CacheMismatchError: the cache was begun with other settings, data, teacher or tokenizer.
            CacheError: the place holds something else than a cache, or cannot be written.
        """
        require_place(self.store)
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(self.store.lock())
            _remove_temporaries(self.store)
            with naming_successor(self.store, self._lock.token):
                self._begin()
            self._locked = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the place."""
        self._locked.__exit__(kind, error, trace)

    @property
    def shards(self) -> ShardWriter:
        """The writer of shards. Other processes may use it too while this one holds the lock."""
        assert self._lock is not None, "the place is locked on entering"
        return ShardWriter(self.store, self.manifest, self._lock.token)

    def missing_shards(self) -> list[int]:
        """Return the shards that have not been written yet."""
        committed = set(committed_shards(self.store)) if self._root.pending else set[int]()
        pending = range(len(self._root.commits), self.manifest.num_shards)
        return [*self._missing_of_finished(), *(shard for shard in pending if shard not in committed)]

    def notes(self) -> dict[int, Note]:
        """Return the notes that dead processes have left at missing shards; delete those at other shards.

        Raises:
            CacheFormatError, CacheCorruptError: an object is no note.
        """
        missing, found = set(self.missing_shards()), noted_shards(self.store)
        for_each(self.store, self.shards.delete_note, [shard for shard in found if shard not in missing])
        self._noted = [shard for shard in found if shard in missing]
        notes = at_once(lambda shard: read_note(self.store, shard), self._noted)
        return {note.shard: note for note in notes}

    def write_shard(
        self, shard: int, sequences: Sequence[SequenceRows], left_out: Mapping[str, str] = MappingProxyType({})
    ) -> CommitRecord:
        """Write a shard; see `ShardWriter.write`."""
        return self.shards.write(shard, sequences, left_out)

    def link_shard(self, shard: int, source: Store, record: CommitRecord, table: pa.Table) -> CommitRecord:
        """Take over a shard of another cache; see `ShardWriter.link`."""
        return self.shards.link(shard, source, record, table)

    @property
    def is_sealed(self) -> bool:
        """Whether the cache has all shards of all its parts."""
        return not self._root.pending and not self._root.lost_shards

    def seal(self) -> Root:
        """Make all shards part of the cache in one step; then renew the metadata for other readers of Zarr.

        Raises:
            CacheIncompleteError: a shard is not committed, or one of its objects is missing or has another size.
            CacheLockedError: another process has taken over.
        """
        assert self._lock is not None, "the place is locked on entering"
        if missing := self.missing_shards():
            whose = "; ".join(map(describe_part, parts_of(self.manifest.parts, missing)))
            raise CacheIncompleteError(
                f"{self.store} cannot be sealed: shards {missing} are not committed; run the capture of {whose} again"
            )
        for_each(self.store, self.shards.delete_note, self._noted)
        if not self.is_sealed:
            commits = dict(enumerate(self._root.commits))
            written = [shard for shard in range(self.manifest.num_shards) if commits.get(shard) is None]
            found = dict(zip(written, at_once(self._commit, written), strict=True))
            commits |= {shard: sum_ for shard, (sum_, _) in found.items()}
            parts = self._sealed_parts({shard: num_sequences for shard, (_, num_sequences) in found.items()})
            manifest = dataclasses.replace(self._root.manifest, parts=parts)
            ordered = tuple(commits[shard] for shard in range(self.manifest.num_shards))
            self._swap(dataclasses.replace(self._root, manifest=manifest, commits=ordered, pending=()))
        with naming_successor(self.store, self._lock.token):
            write_derived_metadata(self.store, self._root)
        return self._root

    def _sealed_parts(self, num_sequences: Mapping[int, int]) -> tuple[Part, ...]:
        """Return the parts of the sealed cache, given the sequences of each shard that was written.

        A part that has fewer sequences than were planned names the examples that were left out.
        """
        parts, start = list(self._root.manifest.parts), len(self._root.commits)
        for part in self._root.pending:
            shards = range(start, start := start + part.num_shards)
            left_out: dict[str, str] = {}
            if sum(num_sequences[shard] for shard in shards) < part.num_sequences:
                for shard in shards:
                    left_out |= self._left_out_of(shard)
            parts.append(part.without(left_out))
        return tuple(parts)

    def _left_out_of(self, shard: int) -> dict[str, str]:
        record, key = read_record(self.store, self.manifest, shard, None), sequences_key(shard)
        return left_out_of(read_object(self.store, key, record.objects[key]))

    def _commit(self, shard: int) -> tuple[ObjectSum, int]:
        """Return the sum of a shard's record and its number of sequences after checking the sizes of its objects."""
        record = read_record(self.store, self.manifest, shard, None)
        for key, expected in record.objects.items():
            found = self.store.size(key)
            if found != expected.num_bytes:
                raise CacheIncompleteError(
                    f"{self.store}/{key} has {'no' if found is None else found} bytes, expected {expected.num_bytes}; "
                    "`todi-cache verify` lists all damage"
                )
        return ObjectSum.of(self.store.read(record_key(shard))), record.num_sequences

    def _missing_of_finished(self) -> list[int]:
        """Return the lost shards of finished parts that have not been written again."""
        lost = self._root.lost_shards
        return [shard for shard in lost if self.store.size(record_key(shard)) is None]

    def _begin(self) -> None:
        """Write the root of a new cache, or the pending parts into the root that is there."""
        is_new = not has_cache(self.store)
        if is_new:
            _require_no_strays(self.store, 0)
            self._root = Root(
                manifest=dataclasses.replace(self.manifest, parts=()),
                pending=self.manifest.parts,
                tokenizer=self._tokenizer_sum(),
            )
            self._write_tokenizer()
            if not self.store.create(ROOT_KEY, self._root.to_bytes()):
                raise CacheLockedError(f"{self.store} was begun by another process just now; run the command again")
            return
        found = read_root(self.store)
        require_same_identity(self.store, found.manifest, self.manifest)
        self._root = found
        begun = self._going_on(found)
        if begun.tokenizer is None or read_if_there(self.store, TOKENIZER_KEY) is None:
            begun = dataclasses.replace(begun, tokenizer=self._tokenizer_sum())
            self._write_tokenizer()
        if begun != found or self.store.size(ROOT_KEY) is None:  # a cache of format 1 has no root
            self._swap(begun)
        else:
            self._root = begun

    def _going_on(self, found: Root) -> Root:
        """Return the root of a cache that has begun the missing parts of the manifest.

        Raises:
            CacheMismatchError: the cache holds other parts, or has begun other ones.
        """
        finished, wanted = found.manifest.parts, self.manifest.parts
        if _are_same(found.parts[: len(wanted)], wanted):
            wanted = (*wanted, *found.parts[len(wanted) :])  # another capture has added these since
        if not _are_same(finished, wanted[: len(finished)]):
            raise CacheMismatchError(
                f"{self.store} holds other data: {'; '.join(map(describe_part, finished)) or 'nothing yet'}; expected "
                f"{'; '.join(map(describe_part, wanted))}; choose another folder"
            )
        added = wanted[len(finished) :]
        if found.pending and not _are_same(found.pending, added):
            raise CacheMismatchError(
                f"the capture of {'; '.join(map(describe_part, found.pending))} into {self.store} is not finished; run "
                f"it again first, or give it up with `todi-cache repair {self.store} --abandon`"
            )
        if added and not found.pending:
            _require_no_strays(self.store, len(found.commits))
        pending = tuple(
            _with_versions(part, before) for part, before in zip(added, found.pending or added, strict=True)
        )
        self.manifest = dataclasses.replace(self.manifest, parts=(*finished, *pending))
        return dataclasses.replace(found, pending=pending)

    def _tokenizer_sum(self) -> ObjectSum | None:
        return None if self._tokenizer_json is None else ObjectSum.of(self._tokenizer_json.encode())

    def _write_tokenizer(self) -> None:
        if self._tokenizer_json is not None:
            self.store.write(TOKENIZER_KEY, self._tokenizer_json.encode())

    def _swap(self, root: Root) -> None:
        assert self._lock is not None, "the place is locked on entering"
        require_held(self.store, self._lock.token)
        replace_root(self.store, root, self._root)
        self._root = root


def replace_root(store: Store, root: Root, before: Root | None = None) -> None:
    """Replace the root of a cache in one step; a cache of format 1 becomes one of format 2.

    `before` is the root on which the change is based, by default the present one.

    Raises:
        CacheLockedError: another process has replaced the root in the meantime.
    """
    old = read_if_there(store, ROOT_KEY)
    if old is not None and before is not None:
        old = before.to_bytes()
    data = root.to_bytes()
    if not (store.create(ROOT_KEY, data) if old is None else store.swap(ROOT_KEY, data, old)):
        raise CacheLockedError(f"another process has changed {store} in the meantime; run the command again")
    if old is None:
        write_derived_metadata(store, root)
        for key in (SEALED_KEY, APPEND_KEY):
            store.delete(key)


def write_derived_metadata(store: Store, root: Root) -> None:
    """Write the metadata objects for other readers of Zarr that do not follow from the root.

    An object that another process replaces in the meantime stays: it follows from a newer root.
    """
    for key, data in derived_metadata(root).items():
        found = read_if_there(store, key)
        if found is None:
            store.create(key, data)
        elif found != data:
            store.swap(key, data, found)


def _are_same(found: Sequence[Part], wanted: Sequence[Part]) -> bool:
    """Whether parts hold the same data in the same layout, whatever versions of the libraries made them."""

    def facts(part: Part) -> tuple[object, ...]:
        part = part.planned
        return part.recipe, part.content, part.num_sequences, part.num_shards

    return list(map(facts, found)) == list(map(facts, wanted))


def _with_versions(part: Part, begun: Part) -> Part:
    """Return a part with the library versions of all runs that worked on it."""
    versions = {
        name: ", ".join(dict.fromkeys([*begun.versions.get(name, version).split(", "), version]))
        for name, version in part.versions.items()
    }
    return dataclasses.replace(part, versions=versions)


def _require_no_strays(store: Store, first: int) -> None:
    """Refuse to append beside commit records that the root does not name: the capture would take them for its own."""
    strays = [record_key(shard) for shard in committed_shards(store) if shard >= first]
    if strays:
        raise CacheMismatchError(
            f"{store} has {', '.join(strays[:3])}{', ...' if len(strays) > 3 else ''}, which no root names; "
            + ("delete them with `todi-cache repair`" if first else "delete the folder, or choose another")
        )


def _remove_temporaries(store: Store) -> None:
    """Remove the temporary files of killed writers; only folders have such files."""
    if isinstance(store, LocalStore):
        for key in filter(is_temporary, store.find()):
            store.delete(key)


def require_place(store: Store) -> None:
    """Refuse a place with files that neither a cache nor an interrupted creation of one can have left.

    Raises:
        CacheError: the place holds foreign files and no cache.
    """
    if not has_cache(store) and any(not (is_own(key) or is_temporary(key)) for key in store.find()):
        raise CacheError(f"{store} is not empty and holds no cache; choose another folder")
