"""Sequences with their targets in, the bytes that a cache of many such sequences takes out.

The real encoders and codecs run on the sample. What depends on numbers that only the teacher has is counted by the
target, and the rest by the token, the sequence and the shard.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.layout import CHUNK_TARGETS, CHUNK_TOKENS, ArraySpec, CacheSettings, array_specs
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows, sequence_table, table_bytes
from todi_offline.cache.format.shard import encode_shard, index_bytes


@dataclass(frozen=True, slots=True)
class Amount:
    """How much data a cache holds."""

    num_sequences: int
    num_tokens: int
    num_targets: int
    num_shards: int
    last_targets: int
    """Of a shard's last chunk of targets, the rows that are used: the mean over shards. What is not used is zeros."""
    last_tokens: int
    """The same of tokens."""


def amount_of(num_tokens: npt.NDArray[np.int64], num_targets: npt.NDArray[np.int64], starts: Sequence[int]) -> Amount:
    """Add up sequences of these lengths, which lie in shards that begin at these places."""
    if not starts:
        return Amount(0, 0, 0, 0, 0, 0)
    last = [
        round(float((np.add.reduceat(counts, starts) % rows).mean()))
        for counts, rows in ((num_targets, CHUNK_TARGETS), (num_tokens, CHUNK_TOKENS))
    ]
    return Amount(len(num_tokens), int(num_tokens.sum()), int(num_targets.sum()), len(starts), *last)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """What a part of a cache takes on disk."""

    per_target: float
    per_token: float
    per_sequence: float = 0.0
    per_shard: float = 0.0

    def total(self, amount: Amount) -> float:
        """Return the bytes of so much data."""
        return (
            self.per_target * amount.num_targets
            + self.per_token * amount.num_tokens
            + self.per_sequence * amount.num_sequences
            + self.per_shard * amount.num_shards
        )


def narrowed(sequences: Sequence[SequenceRows], settings: CacheSettings) -> list[SequenceRows]:
    """Return what a capture with smaller settings would have kept of these sequences."""
    return [dataclasses.replace(each, targets=narrow(each.targets, settings, each.content_key)) for each in sequences]


def kept_mass(sequences: Sequence[SequenceRows]) -> float:
    """Return the mean probability of the kept ids together, over all targets."""
    masses = [np.exp(each.targets.logprobs.astype(np.float64)).sum(axis=1) for each in sequences]
    return float(np.concatenate(masses).mean())


def measured_bytes(
    sequences: Sequence[SequenceRows], settings: CacheSettings, vocab_size: int, amount: Amount
) -> StoredBytes:
    """Store sequences whose targets have these settings, in memory, and return what `amount` of such data takes.

    Raises:
        TargetsError: the encoding cannot store a number, or bf16_logit is asked of a teacher with other logits.
    """
    encoded = [encode_rows(each.targets, settings.encoding) for each in sequences]
    specs = array_specs(settings, vocab_size)
    columns = columns_of(encoded)
    per_target, last_chunks = _rows_bytes(specs, columns, settings.codec, amount.last_targets)
    tokens = token_bytes([(each.token_ids, each.target_mask) for each in sequences], settings, vocab_size, amount)
    half = -(-len(sequences) // 2)
    sizes = [
        len(table_bytes(sequence_table(0, sequences[:number], encoded[:number], settings)))
        for number in (half, len(sequences))
    ]
    per_sequence = (sizes[1] - sizes[0]) / (len(sequences) - half) if half < len(sequences) else float(sizes[1])
    per_table = sizes[1] - per_sequence * len(sequences)
    return StoredBytes(per_target, tokens.per_token, per_sequence, tokens.per_shard + last_chunks + per_table)


def token_bytes(
    sequences: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]],
    settings: CacheSettings,
    vocab_size: int,
    amount: Amount,
) -> StoredBytes:
    """Return what tokens and masks take, and the indices of all arrays; targets take nothing here."""
    specs = array_specs(settings, vocab_size)
    columns = {
        name: np.concatenate([each[column] for each in sequences])
        for column, name in enumerate(("token_ids", "target_mask"))
    }
    per_token, last_chunks = _rows_bytes(specs, columns, settings.codec, amount.last_tokens)
    return StoredBytes(0.0, per_token, per_shard=last_chunks + sum(map(index_bytes, specs.values())))


def columns_of(encoded: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of encoded sequences, each name's end to end."""
    return {name: np.concatenate([arrays[name] for arrays in encoded]) for name in encoded[0]}


def as_sequences(examples: Sequence[Any], targets: Sequence[TargetRows]) -> list[SequenceRows]:
    """Return examples with their targets, as a shard takes them."""
    return [
        SequenceRows(example.id, example.source, example.token_ids, example.target_mask, rows)
        for example, rows in zip(examples, targets, strict=True)
    ]


def _rows_bytes(
    specs: Mapping[str, ArraySpec], columns: Mapping[str, npt.NDArray[Any]], codec: str, last_rows: int
) -> tuple[float, float]:
    """Return the mean bytes of a row in full chunks, and what a last chunk of so many rows takes beyond its rows'."""
    per_row = sum(_mean_bytes(specs[name], values, codec) for name, values in columns.items())
    last = sum(stored_bytes(specs[name], values[:last_rows], codec) for name, values in columns.items())
    num_rows = min(last_rows, min(map(len, columns.values())))
    return per_row, max(last - per_row * num_rows, 0.0) if num_rows else 0.0


def _mean_bytes(spec: ArraySpec, values: npt.NDArray[Any], codec: str) -> float:
    rows = len(values) // spec.chunk_rows * spec.chunk_rows or len(values)
    return stored_bytes(spec, values[:rows], codec) / rows


def stored_bytes(spec: ArraySpec, values: npt.NDArray[Any], codec: str) -> int:
    """Return the bytes of the chunks that hold these rows."""
    if not len(values):
        return 0
    whole = dataclasses.replace(spec, shard_rows=spec.chunks_of(len(values)) * spec.chunk_rows)
    return len(encode_shard(whole, values, codec)) - index_bytes(whole)
