"""The rows of a shard in, its objects and its commit record out. It takes no lock, so any process can run it.

An object is created and never replaced, with one exception. An earlier attempt at the same shard may have left an
object with other bytes and no commit record. Such an object makes way while the capture still holds its lock.
Therefore a stalled process cannot touch the objects that its successor has committed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.fetching import for_each
from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.names import attempt_key, record_key, sequences_key
from todi_offline.cache.format.notes import Note
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.rows import Array
from todi_offline.cache.format.sequences import SequenceRows, renumbered_table, sequence_table, table_bytes
from todi_offline.cache.format.shard import chunk_sums, encode_shard
from todi_offline.cache.objects import read_record
from todi_offline.cache.store import Store
from todi_offline.cache.store.locks import naming_successor, read_holder, require_held
from todi_offline.errors import CacheLockedError, DataError


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """Writes shards of one cache; may be pickled and sent to the processes that share the work."""

    store: Store
    manifest: Manifest
    """The manifest of the cache when all its parts are finished."""
    token: str
    """The token of the lock under which the shards are written."""

    def write(
        self, shard: int, sequences: Sequence[SequenceRows], left_out: Mapping[str, str] = MappingProxyType({})
    ) -> CommitRecord:
        """Write the objects of a shard, then its commit record. A shard without a record does not exist.

        `left_out` has the ids of the planned examples that are not in the shard, each with the reason.

        Raises:
            DataError: there is no sequence, or a sequence has ids beyond the vocabulary or does not have the cache's
                settings.
            TargetsError: a number cannot be stored.
            CacheLockedError: another process has taken over, or has committed this shard with other bytes.
            CacheError: the store cannot be written.
        """
        require_held(self.store, self.token)
        self._require_rows(shard, sequences)
        settings = self.manifest.settings
        encoded = [encode_rows(sequence.targets, settings.encoding) for sequence in sequences]
        arrays = _shard_arrays(sequences, encoded)
        keys = [self.manifest.arrays[name].object_key(shard) for name in arrays]

        def create(name: str, key: str) -> ObjectSum:
            spec = self.manifest.arrays[name]
            data = encode_shard(spec, arrays[name], settings.codec)
            return self._create(shard, key, data, chunk_sums(spec, data))

        with naming_successor(self.store, self.token):
            objects = dict(zip(keys, for_each(self.store, create, arrays, keys), strict=True))
            return self._commit(shard, sequence_table(shard, sequences, encoded, settings, left_out), objects)

    def link(self, shard: int, source: Store, record: CommitRecord, table: pa.Table) -> CommitRecord:
        """Take over a committed shard of a cache with the same settings; link its objects where possible.

        `record` and `table` are the shard's commit record and sequence table in that cache. Raises as `write`.
        """
        require_held(self.store, self.token)
        keys = {spec.object_key(record.shard): spec.object_key(shard) for spec in self.manifest.arrays.values()}
        with naming_successor(self.store, self.token):
            for_each(self.store, partial(self._copy, shard, source), keys.keys(), keys.values())
            objects = {here: record.objects[there] for there, here in keys.items()}
            return self._commit(shard, renumbered_table(table, shard, self.manifest.settings.shard_tokens), objects)

    def committed(self, shard: int) -> CommitRecord | None:
        """Return the commit record of a shard that another worker under the same lock has written, or None.

        Raises:
            CacheLockedError: another process has taken over.
        """
        require_held(self.store, self.token)
        if self.store.size(record_key(shard)) is None:
            return None
        return read_record(self.store, self.manifest, shard, None)

    def write_note(self, note: Note) -> None:
        """Leave a note on the attempt at a shard that begins now, in place of an earlier note.

        Raises:
            CacheLockedError: another process has taken over.
            CacheError: the store cannot be written.
        """
        require_held(self.store, self.token)
        with naming_successor(self.store, self.token):
            self.store.write(attempt_key(note.shard), note.to_bytes())

    def restore_note(self, note: Note) -> None:
        """Put back what was known before an attempt that is given up; raises as `write_note`.

        The coordinator may have released the lock by then. The note of another process stays as it is.
        """
        require_held(self.store, self.token, or_released=True)
        self.store.write(attempt_key(note.shard), note.to_bytes())

    def delete_note(self, shard: int) -> None:
        """Delete the note on an attempt at a shard, if there is one; else as `restore_note`."""
        require_held(self.store, self.token, or_released=True)
        with naming_successor(self.store, self.token):
            self.store.delete(attempt_key(shard))

    def _commit(self, shard: int, table: pa.Table, objects: dict[str, ObjectSum]) -> CommitRecord:
        objects[sequences_key(shard)] = self._create(shard, sequences_key(shard), table_bytes(table))
        record = CommitRecord(
            shard=shard,
            num_sequences=len(table),
            num_tokens=int(table["num_tokens"].to_numpy().sum()),
            num_targets=int(table["num_targets"].to_numpy().sum()),
            content=ContentKeys.from_column(table["content_key"]).digest(),
            objects=objects,
        )
        require_held(self.store, self.token)
        if not self.store.create(record_key(shard), record.to_bytes()):
            raise self._taken(shard)
        return record

    def _create(self, shard: int, key: str, data: bytes, chunks: bytes = b"") -> ObjectSum:
        if not self.store.create(key, data):
            leftover = self.store.read(key, self.store.size(key) or 0)
            self._require_uncommitted(shard)
            if not self.store.swap(key, data, leftover):
                raise self._taken(shard)
        return ObjectSum.of(data, chunks)

    def _copy(self, shard: int, source: Store, source_key: str, key: str) -> None:
        if not self.store.copy_from(source, source_key, key):
            self._require_uncommitted(shard)
            self.store.delete(key)
            if not self.store.copy_from(source, source_key, key):
                raise self._taken(shard)

    def _require_uncommitted(self, shard: int) -> None:
        """Refuse to replace an object of a committed shard, or without the lock."""
        require_held(self.store, self.token)
        if self.store.size(record_key(shard)) is not None:
            raise self._taken(shard)

    def _taken(self, shard: int) -> CacheLockedError:
        holder = read_holder(self.store)
        who = holder if holder is not None and holder.token != self.token else "another process"
        return CacheLockedError(
            f"shard {shard} of {self.store} was written by {who} in the meantime and stays as it is; run the "
            "command again: it continues from there"
        )

    def _require_rows(self, shard: int, sequences: Sequence[SequenceRows]) -> None:
        """Refuse rows that a reader of the cache would refuse."""
        if not sequences:
            raise DataError(f"shard {shard} of {self.store} would have no sequence; leave the shard out of the plan")
        settings, vocab_size = self.manifest.settings, self.manifest.vocab_size
        for name in ("token_ids", "targets"):
            num_rows = sum(len(getattr(sequence, name)) for sequence in sequences)
            if num_rows > settings.shard_tokens:
                raise DataError(
                    f"shard {shard} of {self.store} would have {num_rows:,} {name}, more than the "
                    f"{settings.shard_tokens:,} that a shard holds"
                )
        expected = (settings.k, settings.temperatures, settings.tail_samples)
        for sequence in sequences:
            rows = sequence.targets
            samples = 0 if rows.tail_ids is None else rows.tail_ids.shape[1]
            if (found := (rows.ids.shape[1], rows.temperatures, samples)) != expected:
                raise DataError(
                    f"sequence {sequence.id!r} has k, temperatures and samples {found}; expected {expected}, as "
                    f"{self.store} has"
                )
            numbers = [sequence.token_ids, rows.ids, *([] if rows.tail_ids is None else [rows.tail_ids])]
            if (largest := max(int(ids.max(initial=0)) for ids in numbers)) >= vocab_size:
                raise DataError(
                    f"sequence {sequence.id!r} has the id {largest}, beyond the vocabulary of {vocab_size} ids; "
                    "check that teacher and tokenizer belong together"
                )


def _shard_arrays(
    sequences: Sequence[SequenceRows], encoded: Sequence[dict[str, Array]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a shard: its sequences end to end."""
    return {
        "token_ids": np.concatenate([sequence.token_ids for sequence in sequences]),
        "target_mask": np.concatenate([sequence.target_mask for sequence in sequences]),
        **{name: np.concatenate([arrays[name] for arrays in encoded]) for name in encoded[0]},
    }
