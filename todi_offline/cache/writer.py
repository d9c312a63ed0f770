"""Rows of a shard in, its Zarr objects, sequence table and commit record out.

with CacheWriter(root, manifest) as writer:      # creates the cache, or goes on with it
    for shard in writer.missing_shards():
        writer.write_shard(shard, rows)
    writer.seal()
"""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.appending import described, is_finished, parts_of, require_begun_alike
from todi_offline.cache.format.encoding import Array, TargetRows, decode_rows, encode_rows
from todi_offline.cache.format.fingerprint import content_key, differences, hash_bytes
from todi_offline.cache.format.layout import (
    APPEND_KEY,
    MANIFEST_KEY,
    SEQUENCE_SCHEMA,
    TOKENIZER_KEY,
    ArraySpec,
    CacheSettings,
    record_key,
    sequences_key,
)
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.records import (
    SEAL_KEY,
    CommitRecord,
    ObjectSum,
    Seal,
    committed_shards,
    read_object,
    read_record,
    to_bytes,
    write_object,
)
from todi_offline.cache.format.shard import PCODEC_LEVEL, blosc_options, chunk_sums, encode_shard
from todi_offline.cache.reader import read_manifest
from todi_offline.cache.store import LOCK_KEY, TEMPORARY_SUFFIX, Store, open_store
from todi_offline.errors import CacheError, CacheIncompleteError, CacheMismatchError


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A captured sequence: what the teacher read, and its targets."""

    id: str
    source: str
    token_ids: npt.NDArray[np.uint32]
    target_mask: npt.NDArray[np.bool_]
    targets: TargetRows


class CacheWriter:
    """The place of a cache, locked for writing."""

    def __init__(self, place: str | Path | Store, manifest: Manifest, tokenizer_json: str | None = None) -> None:
        """Name what is to be written; `tokenizer_json` lets the tools show text without the teacher."""
        self.store = open_store(place)
        self.manifest = manifest
        self._tokenizer_json = tokenizer_json
        self._locked = contextlib.ExitStack()

    def __enter__(self) -> "CacheWriter":
        """Lock the place, and create the cache or check that it is the one to go on with.

        Raises:
            CacheLockedError: another process writes to it.
            CacheMismatchError: it was begun with other settings, data, teacher or tokenizer.
            CacheError: the place is not empty and no cache, or cannot be written.
        """
        if self.store.size("zarr.json") is None and _foreign(self.store, self.manifest):
            raise CacheError(f"{self.store} is not empty and holds no cache; choose another folder")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.store.lock())
            self._create_or_check()
            self._locked = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the place."""
        self._locked.__exit__(kind, error, trace)

    def missing_shards(self) -> list[int]:
        """Return the shards that have no commit record yet."""
        return sorted(set(range(self.manifest.num_shards)) - set(committed_shards(self.store)))

    def write_shard(self, shard: int, sequences: list[SequenceRows]) -> CommitRecord:
        """Write the objects of a shard, then its commit record; until then the shard does not exist."""
        settings = self.manifest.settings
        encoded = [encode_rows(sequence.targets, settings.encoding) for sequence in sequences]
        objects: dict[str, ObjectSum] = {}
        for name, values in _shard_arrays(sequences, encoded).items():
            spec = self.manifest.arrays[name]
            key = spec.object_key(shard)
            data = encode_shard(spec, values, settings.codec)
            objects[key] = write_object(self.store, key, data, chunk_sums(spec, data))
        return self._commit(shard, sequence_table(shard, sequences, encoded, settings), objects)

    def link_shard(self, shard: int, source: Store, record: CommitRecord, table: pa.Table) -> CommitRecord:
        """Take a committed shard over from a cache with the same settings, without moving its bytes where possible.

        `record` and `table` are its commit record and sequence table there.
        """
        objects = {}
        for spec in self.manifest.arrays.values():
            self.store.copy_from(source, spec.object_key(record.shard), spec.object_key(shard))
            objects[spec.object_key(shard)] = record.objects[spec.object_key(record.shard)]
        return self._commit(shard, moved_table(table, shard, self.manifest.settings.shard_tokens), objects)

    def _commit(self, shard: int, table: pa.Table, objects: dict[str, ObjectSum]) -> CommitRecord:
        objects[sequences_key(shard)] = write_object(self.store, sequences_key(shard), table_bytes(table))
        record = CommitRecord(
            shard=shard,
            num_sequences=len(table),
            num_tokens=int(table["num_tokens"].to_numpy().sum()),
            num_targets=int(table["num_targets"].to_numpy().sum()),
            content=hash_bytes(table["content_key"].to_pylist()),
            objects=objects,
        )
        self.store.create(record_key(shard), to_bytes(record))
        return record

    def seal(self) -> Seal:
        """Close the cache once every shard is committed.

        Raises:
            CacheIncompleteError: a shard is not committed, or one of its objects is gone or of another size.
        """
        missing = self.missing_shards()
        if missing:
            whose = "; ".join(map(described, parts_of(self.manifest, missing)))
            raise CacheIncompleteError(
                f"{self.store} cannot be sealed: shards {missing} are not committed; capture {whose} (again)"
            )
        records = [read_record(self.store, record_key(shard)) for shard in range(self.manifest.num_shards)]
        for record in records:
            _require_objects(self.store, record)
        self._renew_metadata()
        keys = [*metadata_keys(self.store, self.manifest), *map(record_key, range(self.manifest.num_shards))]
        seal = Seal(
            num_shards=self.manifest.num_shards,
            num_sequences=sum(record.num_sequences for record in records),
            num_tokens=sum(record.num_tokens for record in records),
            num_targets=sum(record.num_targets for record in records),
            objects={key: ObjectSum.of(read_object(self.store, key)) for key in keys},
        )
        write_object(self.store, SEAL_KEY, to_bytes(seal))
        self._end_append()
        return seal

    @property
    def sealed(self) -> bool:
        """Whether the cache is finished."""
        return is_finished(self.store, self.manifest)

    def _create_or_check(self) -> None:
        begun = self.store.size("zarr.json") is not None
        if begun:
            found = read_manifest(self.store)
            if found.parts == self.manifest.parts[:-1] and is_finished(self.store, found):
                self._begin_append(found)
                return
            require_begun_alike(self.store, found, self.manifest)
            if self.sealed:
                self._end_append()
        for key, data in self._metadata():
            if not (begun and self.store.size(key) is not None):  # what was lost is written again
                write_object(self.store, key, data)

    def _begin_append(self, found: Manifest) -> None:
        """Write down what the cache is to be, or go on where that stands; `found` is what it is."""
        require_begun_alike(self.store, dataclasses.replace(found, parts=self.manifest.parts), self.manifest)
        begun = _append_of(self.store)
        strays = [record_key(shard) for shard in committed_shards(self.store) if shard >= found.num_shards]
        if begun is None or begun == found:
            if strays:
                raise CacheMismatchError(
                    f"{self.store} has {', '.join(strays)}, of which its manifest does not know; `todi-cache verify` "
                    "says more; delete them first"
                )
            write_object(self.store, APPEND_KEY, self._group())
        elif begun != self.manifest:
            lines = differences(begun.to_json(), self.manifest.to_json(), ("begun", "now"))
            raise CacheMismatchError(
                f"another capture has begun to append to {self.store}: {'; '.join(lines)}; run that one again first, "
                f"or give it up: delete {', '.join([APPEND_KEY, *strays])}"
            )

    def _renew_metadata(self) -> None:
        """Write the metadata that an append changes, the manifest first: so a reader in between can tell."""
        for key, data in reversed(list(self._metadata())):
            if key != TOKENIZER_KEY and self.store.read(key) != data:
                write_object(self.store, key, data)

    def _end_append(self) -> None:
        """Remove what said that an append was under way, unless it is another one's."""
        if _append_of(self.store) == self.manifest:
            self.store.delete(APPEND_KEY)

    def _metadata(self) -> Iterator[tuple[str, bytes]]:
        """Yield the objects that describe the cache as a whole; the last of them makes the folder one."""
        if self._tokenizer_json is not None:
            yield TOKENIZER_KEY, self._tokenizer_json.encode()
        for spec in self.manifest.arrays.values():
            yield f"{spec.name}/zarr.json", array_metadata(spec, self.manifest.settings.codec, self.manifest.num_shards)
        yield "zarr.json", self._group()

    def _group(self) -> bytes:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {MANIFEST_KEY: self.manifest.to_json()}}
        return (json.dumps(group, indent=1) + "\n").encode()


def _append_of(store: Store) -> Manifest | None:
    """Return what an append that was begun wants the cache to be."""
    return None if store.size(APPEND_KEY) is None else read_manifest(store, APPEND_KEY)


def metadata_keys(store: Store, manifest: Manifest) -> list[str]:
    """Return the objects that describe a cache as a whole."""
    tokenizer = [TOKENIZER_KEY] if store.size(TOKENIZER_KEY) is not None else []
    return ["zarr.json", *(f"{name}/zarr.json" for name in manifest.arrays), *tokenizer]


@lru_cache(maxsize=64)
def array_metadata(spec: ArraySpec, codec: str, num_shards: int) -> bytes:
    """Return the `zarr.json` of an array, as zarr-python writes it."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        options = blosc_options(codec, spec.dtype)
        array = zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=spec.shape(num_shards * spec.shard_rows),
            shards=spec.shape(spec.shard_rows),
            chunks=spec.shape(spec.chunk_rows),
            dtype=spec.dtype,
            fill_value=0,
            filters=None,
            serializer="auto" if options else PCodec(level=PCODEC_LEVEL),
            compressors=[*([BloscCodec(**options)] if options else []), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        return (json.dumps(array.metadata.to_dict(), indent=1, default=str) + "\n").encode()


def sequence_table(
    shard: int, sequences: list[SequenceRows], encoded: list[dict[str, Array]], settings: CacheSettings
) -> pa.Table:
    """Return the table of what belongs to a sequence rather than to a position.

    Means are of the numbers as they are stored: rows that are copied to another cache keep them to the bit.
    """
    first = shard * settings.shard_tokens
    kept = (settings.encoding, settings.temperatures, settings.tail_temperature)
    stored = [decode_rows(arrays, *kept) for arrays in encoded]
    num_tokens = np.array([len(sequence.token_ids) for sequence in sequences], np.int64)
    num_targets = np.array([len(sequence.targets) for sequence in sequences], np.int64)
    columns = {
        "id": [sequence.id for sequence in sequences],
        "source": [sequence.source for sequence in sequences],
        "content_key": [content_key(sequence.token_ids, sequence.target_mask) for sequence in sequences],
        "shard": np.full(len(sequences), shard),
        "token_start": first + np.cumsum(num_tokens) - num_tokens,
        "num_tokens": num_tokens,
        "target_start": first + np.cumsum(num_targets) - num_targets,
        "num_targets": num_targets,
        "teacher_nll": [-rows.label_logprob.mean(dtype=np.float64) for rows in stored],
        "topk_mass": [np.exp(rows.logprobs).sum(axis=1).mean(dtype=np.float64) for rows in stored],
    }
    return pa.table({name: pa.array(column).cast(SEQUENCE_SCHEMA.field(name).type) for name, column in columns.items()})


def moved_table(table: pa.Table, shard: int, shard_tokens: int) -> pa.Table:
    """Return the sequence table of a shard as it is where its objects are those of shard number `shard`."""
    shift = (shard - table["shard"].to_numpy().astype(np.int64)) * shard_tokens
    columns = {
        "shard": np.full(len(table), shard, np.uint32),
        "token_start": table["token_start"].to_numpy() + shift,
        "target_start": table["target_start"].to_numpy() + shift,
    }
    for name, values in columns.items():
        table = table.set_column(SEQUENCE_SCHEMA.get_field_index(name), SEQUENCE_SCHEMA.field(name), pa.array(values))
    return table


def _shard_arrays(sequences: list[SequenceRows], encoded: list[dict[str, Array]]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a shard: its sequences end to end."""
    return {
        "token_ids": np.concatenate([sequence.token_ids for sequence in sequences]),
        "target_mask": np.concatenate([sequence.target_mask for sequence in sequences]),
        **{name: np.concatenate([arrays[name] for arrays in encoded]) for name in encoded[0]},
    }


def table_bytes(table: pa.Table) -> bytes:
    """Return a sequence table as its object."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")  # small beside the arrays, and no bomb to who reads it
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _require_objects(store: Store, record: CommitRecord) -> None:
    for key, expected in record.objects.items():
        found = store.size(key)
        if found != expected.num_bytes:
            raise CacheIncompleteError(
                f"{store}/{key} has {found if found is not None else 'no'} bytes, expected {expected.num_bytes}; "
                "`todi-cache verify` lists what is damaged"
            )


def _foreign(store: Store, manifest: Manifest) -> bool:
    """Whether a place holds anything that no interrupted creation of this cache would have left."""
    ours = {LOCK_KEY, TOKENIZER_KEY, TOKENIZER_KEY + TEMPORARY_SUFFIX, "zarr.json" + TEMPORARY_SUFFIX, *manifest.arrays}
    return any(key.partition("/")[0] not in ours for key in store.find())
