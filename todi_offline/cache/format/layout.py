"""Settings in; the arrays of a cache out: their axes, dtypes, chunks and codecs.

History of the format

    1   the first: token_ids, target_mask, topk_ids, topk_logprobs, tail_logsumexp, label_logprob and,
        where tail samples were asked for, tail_ids and tail_logprobs; with bf16_logit, log_partition
    2   cache.json is the root, which names all commit records and is replaced in one step; chunks that no row uses
        are left out of a shard; the arrays are those of format 1, where k is 0 without those of the kept entries
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.encoding import BY_ID
from todi_offline.errors import ConfigError

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

CHUNK_TARGETS = 512  # measured: the fastest random read of 512 targets
CHUNK_TOKENS = 4096
MAX_GAPS_VOCAB = 2**23  # a key of 32 bits holds the id above the row in its chunk
MAX_COLUMNS = 2**19  # more than any vocabulary; a chunk of more would be larger than blosc can hold
MAX_SHARD_TOKENS = 2**26  # a writer holds a shard in memory

SHARD_BYTES = 2**30  # rows of a shard in memory, for the default size of shards
MAX_SHARD_BYTES = 2**35
DEFAULT_SHARD_TOKENS = 131_072  # the index of an array has 16 bytes a chunk: 4 KiB of a shard, used or not

Axis = Literal["token", "target"]
CODECS = ("compact", "balanced", "fast")
ENCODINGS = ("f16", "q8", "bf16_logit", "root8")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What a cache keeps of every teacher distribution, and how it stores that."""

    k: int = 16
    """Most probable ids to keep at each position; 0 keeps only samples, drawn from all ids."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """A temperature that training may use. May be repeated: the tail's mass is kept at each."""
    tail_samples: int = 8
    """How many of the other ids to draw at each position; 0 draws none."""
    tail_temperature: float = 1.0
    """Temperature at which the tail samples are drawn; use the temperature of the training."""
    tail_seed: int = 0
    """Seed of the tail samples."""
    encoding: Literal["f16", "q8", "bf16_logit", "root8"] = "root8"
    """How log-probs are stored: the fourth roots of probabilities in a byte (`root8`, fewest bytes), half precision
    (`f16`), steps of 1/16 nat (`q8`), or the logits of a bfloat16 head (`bf16_logit`, lossless)."""
    codec: Literal["compact", "balanced", "fast"] = "compact"
    """Compression: compact is pcodec (fewest bytes), balanced blosc-zstd, fast blosc-lz4."""
    shard_tokens: int = 0
    """Tokens in a shard; a killed capture loses its unfinished shards. 0 takes as many as fit into 1 GiB of memory, at
    most 131,072. An existing cache keeps its own size."""

    def __post_init__(self) -> None:
        """Refuse settings that no capture can honour, and choose the size of shards where none is given."""
        if not 0 <= self.k <= MAX_COLUMNS or not 0 <= self.tail_samples <= MAX_COLUMNS:
            raise ConfigError(
                f"k is {self.k} and tail_samples {self.tail_samples}; expected both from 0 to {MAX_COLUMNS:,}"
            )
        if not self.k and not self.tail_samples:
            raise ConfigError("k and tail_samples are 0, so nothing would be kept of the teacher; raise one of them")
        self._check_temperatures()
        if not 0 <= self.tail_seed < 2**64:
            raise ConfigError(f"tail_seed is {self.tail_seed}; expected 0 to 2^64 - 1")
        if not self.shard_tokens:
            object.__setattr__(self, "shard_tokens", min(self._fitting(SHARD_BYTES), DEFAULT_SHARD_TOKENS))
        self._check_shards()
        if self.encoding not in ENCODINGS or self.codec not in CODECS:
            raise ConfigError(
                f"encoding {self.encoding!r} with codec {self.codec!r}; "
                f"expected one of {', '.join(ENCODINGS)} and one of {', '.join(CODECS)}"
            )

    @property
    def target_bytes(self) -> int:
        """Bytes of a target's row in memory, before it is encoded."""
        return 8 * self.k + 8 * self.tail_samples + 4 * len(self.temperatures) + 8

    def _fitting(self, num_bytes: int) -> int:
        """Return the tokens of the largest shard whose rows take so many bytes, at least one chunk."""
        return max(num_bytes // self.target_bytes // CHUNK_TOKENS, 1) * CHUNK_TOKENS

    def _check_shards(self) -> None:
        if not CHUNK_TOKENS <= self.shard_tokens <= MAX_SHARD_TOKENS or self.shard_tokens % CHUNK_TOKENS:
            raise ConfigError(
                f"shard_tokens is {self.shard_tokens}; expected a multiple of {CHUNK_TOKENS} up to {MAX_SHARD_TOKENS}"
            )
        num_bytes, most = self.shard_tokens * self.target_bytes, self._fitting(MAX_SHARD_BYTES)
        if self.shard_tokens > most:
            raise ConfigError(
                f"a shard of {self.shard_tokens:,} tokens with k = {self.k:,} takes up to {num_bytes / 2**30:.0f} GiB "
                f"of memory while it is written; lower shard_tokens to {most:,} or less"
            )

    def _check_temperatures(self) -> None:
        found = self.temperatures
        if not 1 <= len(found) <= MAX_COLUMNS or not all(math.isfinite(t) and t > 0 for t in found):
            raise ConfigError(f"temperatures are {found!s:.200}; expected at least one, each above 0")
        if len(set(found)) < len(found):
            raise ConfigError(f"temperatures are {found}; expected each once")
        if self.tail_samples and self.tail_temperature not in found:
            raise ConfigError(
                f"tail_temperature is {self.tail_temperature}, not one of the temperatures {found}; add it to the "
                "temperatures: samples are weighted with the tail's mass at their own temperature"
            )


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a cache: rows along `axis`, and `columns` numbers a row (None: the row is one number)."""

    name: str
    axis: Axis
    dtype: np.dtype[np.generic]
    columns: int | None
    shard_rows: int
    gaps: bool = False
    """Whether a chunk holds the gaps between sorted keys in place of its rows; see `shard`."""

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk, the unit of compression and of checksums."""
        return CHUNK_TOKENS if self.axis == "token" else CHUNK_TARGETS

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a shard; all lie along the first axis."""
        return self.shard_rows // self.chunk_rows

    def chunks_of(self, rows: int) -> int:
        """Return the number of chunks, the first of a shard, that so many rows use."""
        return -(-rows // self.chunk_rows)

    def shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of `rows` rows."""
        return (rows,) if self.columns is None else (rows, self.columns)

    def object_key(self, shard: int) -> str:
        """Return the path of a shard's object inside the cache."""
        return f"{self.name}/c/{shard}" if self.columns is None else f"{self.name}/c/{shard}/0"


def array_specs(settings: CacheSettings, vocab_size: int) -> Mapping[str, ArraySpec]:
    """Return the arrays of a cache with these settings over a vocabulary of that many ids, by name."""
    by_id, root8 = settings.encoding in BY_ID, settings.encoding == "root8"
    if by_id and vocab_size > MAX_GAPS_VOCAB:
        raise ConfigError(
            f"the vocabulary has {vocab_size:,} ids, but {settings.encoding} takes at most {MAX_GAPS_VOCAB:,}; choose "
            "another encoding"
        )
    id_dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    logprob_dtype = {"f16": "<f2", "q8": "|u1", "bf16_logit": "<u2", "root8": "|u1"}[settings.encoding]
    rows: list[tuple[str, Axis, npt.DTypeLike, int | None]] = [
        ("token_ids", "token", "<u4", None),
        ("target_mask", "token", "|u1", None),
        ("tail_logsumexp", "target", "<i2" if root8 else "<f4", len(settings.temperatures)),
        ("label_logprob", "target", "<i2" if root8 else "<f4", None),
    ]
    if settings.k:
        entries: list[tuple[str, Axis, npt.DTypeLike, int | None]] = [
            ("topk_ids", "target", "<u4" if by_id else id_dtype, settings.k),
            ("topk_logprobs", "target", logprob_dtype, settings.k),
        ]
        rows[2:2] = entries
    if settings.k and settings.encoding == "bf16_logit":
        rows.append(("log_partition", "target", "<f4", None))
    if settings.tail_samples:
        rows.append(("tail_ids", "target", id_dtype, settings.tail_samples))
        rows.append(("tail_logprobs", "target", "|i1" if root8 else "<f2", settings.tail_samples))
    return {
        name: ArraySpec(name, axis, np.dtype(dtype), columns, settings.shard_tokens, by_id and name == "topk_ids")
        for name, axis, dtype, columns in rows
    }
