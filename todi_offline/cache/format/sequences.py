"""Sequences with their targets in, the Parquet table that has a row for each sequence out, and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from todi_offline.cache.format.encoding import decode_rows
from todi_offline.cache.format.keys import content_key
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.records import CommitRecord
from todi_offline.cache.format.rows import Array, TargetRows
from todi_offline.errors import CacheCorruptError, CacheFormatError, DataError, first_line

SEQUENCE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("content_key", pa.binary(16)),
        ("shard", pa.uint32()),
        ("token_start", pa.int64()),
        ("num_tokens", pa.int32()),
        ("target_start", pa.int64()),
        ("num_targets", pa.int32()),
        ("teacher_nll", pa.float32()),
        ("topk_mass", pa.float32()),
    ]
)
_BATCH_ROWS = 256
_LEFT_OUT = b"left_out"  # in the metadata of a table


@dataclass(frozen=True, slots=True)
class CachedSequence:
    """A sequence as the teacher read it, with its targets."""

    token_ids: npt.NDArray[np.uint32]
    """[token]"""
    target_mask: npt.NDArray[np.bool_]
    """[token]: True at t where the prediction made at t, for token t + 1, is stored."""
    targets: TargetRows
    """One row for each True of `target_mask`, in order."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A captured sequence, ready to be written.

    Raises:
        DataError: mask, tokens and targets contradict each other; names the sequence.
    """

    id: str
    source: str
    token_ids: npt.NDArray[np.uint32]
    target_mask: npt.NDArray[np.bool_]
    targets: TargetRows

    def __post_init__(self) -> None:
        """Check that every True of the mask has a row of targets and a token after it."""
        mask = self.target_mask
        is_fitting = self.token_ids.dtype.kind == "u" and mask.dtype == np.bool_ and mask.ndim == 1
        if not is_fitting or mask.shape != self.token_ids.shape:
            raise DataError(
                f"sequence {self.id!r} has {self.token_ids.dtype} tokens of shape {list(self.token_ids.shape)} and a "
                f"{mask.dtype} mask of shape {list(mask.shape)}; expected unsigned integers and as many booleans"
            )
        num_supervised = int(mask.sum())
        if not num_supervised or mask[-1]:
            where = "its last position, which no token follows" if num_supervised else "no position"
            raise DataError(f"sequence {self.id!r} supervises {where}; leave it out, or correct its target mask")
        if num_supervised != len(self.targets):
            raise DataError(
                f"sequence {self.id!r} supervises {num_supervised} positions and has {len(self.targets)} targets; "
                "expected one for each"
            )

    @property
    def content_key(self) -> bytes:
        """The key that identifies the sequence; see `keys.content_key`."""
        return content_key(self.token_ids, self.target_mask)


def sequence_table(
    shard: int,
    sequences: Sequence[SequenceRows],
    encoded: Sequence[dict[str, Array]],
    settings: CacheSettings,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """Return the sequence table of a shard; `encoded` holds the arrays that `encode_rows` made of each sequence.

    `left_out` names the examples that the shard was planned to hold too, each with the reason why it does not.

    Means are over the stored numbers, so that a copy of the rows in another cache has the same means to the bit.
    """
    first = shard * settings.shard_tokens
    kept = (settings.encoding, settings.temperatures, settings.tail_temperature)
    stored = [decode_rows(arrays, *kept) for arrays in encoded]
    num_tokens = np.array([len(sequence.token_ids) for sequence in sequences], np.int64)
    num_targets = np.array([len(sequence.targets) for sequence in sequences], np.int64)
    columns = {
        "id": [sequence.id for sequence in sequences],
        "source": [sequence.source for sequence in sequences],
        "content_key": [sequence.content_key for sequence in sequences],
        "shard": np.full(len(sequences), shard),
        "token_start": first + np.cumsum(num_tokens) - num_tokens,
        "num_tokens": num_tokens,
        "target_start": first + np.cumsum(num_targets) - num_targets,
        "num_targets": num_targets,
        "teacher_nll": [-rows.label_logprob.mean(dtype=np.float64) for rows in stored],
        "topk_mass": [np.exp(rows.logprobs).sum(axis=1).mean(dtype=np.float64) for rows in stored],
    }
    table = pa.table(
        {name: pa.array(column).cast(SEQUENCE_SCHEMA.field(name).type) for name, column in columns.items()}
    )
    return table.replace_schema_metadata({_LEFT_OUT: json.dumps(left_out)}) if left_out else table


def left_out_of(data: bytes) -> dict[str, str]:
    """Return the examples that the table of a shard says were left out, each with the reason."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata.metadata or {}
    found: dict[str, str] = json.loads(metadata.get(_LEFT_OUT, b"{}"))
    return found


def renumbered_table(table: pa.Table, shard: int, shard_tokens: int) -> pa.Table:
    """Return the sequence table of a shard that gets the number `shard`."""
    shift = (shard - table["shard"].to_numpy().astype(np.int64)) * shard_tokens
    columns = {
        "shard": np.full(len(table), shard, np.uint32),
        "token_start": table["token_start"].to_numpy() + shift,
        "target_start": table["target_start"].to_numpy() + shift,
    }
    for name, values in columns.items():
        table = table.set_column(SEQUENCE_SCHEMA.get_field_index(name), SEQUENCE_SCHEMA.field(name), pa.array(values))
    return table


def table_bytes(table: pa.Table) -> bytes:
    """Return a sequence table as Parquet.

    It is not compressed: it is small beside the arrays, and a compressed table could expand without limit in a reader.
    """
    sink = pa.BufferOutputStream()
    # Statistics and Arrow's copy of the schema would take a fifth of a small table, and no reader uses them.
    options = {"compression": "none", "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(sink, table.schema, **options) as file:
        file.write_table(table)
        if table.schema.metadata:
            file.add_key_value_metadata(table.schema.metadata)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def parse_table(data: bytes, record: CommitRecord, where: str) -> pa.Table:
    """Return the table that `table_bytes` wrote for the shard of a commit record.

    Raises:
        CacheFormatError: the table has other columns or another number of rows, or is compressed.
        CacheCorruptError: the bytes are no Parquet.
    """
    try:
        return _parse_table(data, record, where)
    except (pa.ArrowException, OSError) as error:
        raise CacheCorruptError(f"{where} cannot be read: {first_line(error)}") from error


def _parse_table(data: bytes, record: CommitRecord, where: str) -> pa.Table:
    """Parse a table in batches: a small Parquet file can expand without limit, so stop early."""
    file = pq.ParquetFile(pa.BufferReader(data))
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    if file.metadata.num_rows != record.num_sequences or any(c.compression != "UNCOMPRESSED" for c in columns):
        raise CacheFormatError(
            f"{where} has {file.metadata.num_rows} rows, expected {record.num_sequences}, uncompressed"
        )
    if file.schema_arrow.remove_metadata() != SEQUENCE_SCHEMA:
        raise CacheFormatError(f"{where} has the columns {file.schema_arrow.names}")
    batches, num_bytes = [], 0
    for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
        batch.validate(full=True)
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > 2**20 + 64 * len(data):
            raise CacheFormatError(f"{where} expands from {len(data)} bytes to more than {num_bytes}")
    return pa.Table.from_batches(batches, SEQUENCE_SCHEMA).combine_chunks()


def require_places(place: str, table: pa.Table, shard_tokens: int, shard: int) -> None:
    """Refuse a table with an empty cell, or with a sequence outside the rows of its shard."""
    if any(column.null_count for column in table.columns):
        raise CacheFormatError(f"a sequence table of {place} has empty cells; run `todi-cache verify`")
    if (table["shard"].to_numpy() != shard).any():
        raise CacheFormatError(f"the sequence table of shard {shard} of {place} names other shards")
    for axis in ("token", "target"):
        start = table[f"{axis}_start"].to_numpy() - shard * shard_tokens
        count = table[f"num_{axis}s"].to_numpy().astype(np.int64)
        outside = np.flatnonzero((start < 0) | (count < 0) | (start > shard_tokens - count))
        if len(outside):
            name = table["id"][int(outside[0])].as_py()
            raise CacheFormatError(
                f"sequence {name!r} of {place} lies outside its shard on the {axis} axis "
                f"({count[outside[0]]} rows from {start[outside[0]]} of {shard_tokens}); run `todi-cache verify`"
            )
