"""Shards and arrays in, the keys of their objects out; and from a key back to its shard.

A cache owns these keys below its root and no others. All other files there are foreign.

    cache.json                  the root: the manifest, and the sums of the commit records
    commits/000003.json         the commit record of shard 3
    commits/000003.attempt      a note: a process captures shard 3 now, or died while it did
    sequences/000003.parquet    its sequence table
    topk_ids/c/3/0              its part of an array
    zarr.json, */zarr.json      metadata for other readers of Zarr, derived from the root
    tokenizer.json              the teacher's tokenizer, for tools that show text
    .lock                       names the process that writes
    sealed.json, append.json    of format 1
"""

import re

ROOT_KEY = "cache.json"
GROUP_KEY = "zarr.json"
TOKENIZER_KEY = "tokenizer.json"
LOCK_KEY = ".lock"
RECORDS_PREFIX = "commits/"
SEALED_KEY, APPEND_KEY = "sealed.json", "append.json"  # of format 1

ARRAY_NAMES = (
    "token_ids",
    "target_mask",
    "topk_ids",
    "topk_logprobs",
    "tail_logsumexp",
    "label_logprob",
    "log_partition",
    "tail_ids",
    "tail_logprobs",
)
FOLDERS = (*ARRAY_NAMES, "commits", "sequences")
"""The folders that objects of a cache lie in."""
_PLAIN = (ROOT_KEY, GROUP_KEY, TOKENIZER_KEY, LOCK_KEY, SEALED_KEY, APPEND_KEY)
_SHARD_KEYS = (
    re.compile(r"commits/(\d{6,})\.json"),
    re.compile(r"sequences/(\d{6,})\.parquet"),
    re.compile(rf"(?:{'|'.join(ARRAY_NAMES)})/c/(\d+)(?:/0)?"),
    re.compile(r"commits/(\d{6,})\.attempt"),
)
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")


def sequences_key(shard: int) -> str:
    """Return the key of a shard's sequence table."""
    return f"sequences/{shard:06d}.parquet"


def record_key(shard: int) -> str:
    """Return the key of a shard's commit record."""
    return f"{RECORDS_PREFIX}{shard:06d}.json"


def attempt_key(shard: int) -> str:
    """Return the key of the note on an attempt at a shard."""
    return f"{RECORDS_PREFIX}{shard:06d}.attempt"


def is_attempt(key: str) -> bool:
    """Whether a key belongs to a note on an attempt at a shard."""
    return key.endswith(".attempt") and shard_of(key) is not None


def array_key(name: str) -> str:
    """Return the key of an array's metadata."""
    return f"{name}/{GROUP_KEY}"


def temporary_key(key: str, token: str) -> str:
    """Return the name under which an object is written before it gets its own; `token` has 16 hexadecimal digits."""
    return f"{key}.{token}.tmp"


def is_temporary(key: str) -> bool:
    """Whether `temporary_key` made a key from a key of a cache."""
    return bool(_TEMPORARY.search(key)) and is_own(_TEMPORARY.sub("", key))


def is_own(key: str) -> bool:
    """Whether a key belongs to a cache; temporary keys do not."""
    return key in _PLAIN or key in map(array_key, ARRAY_NAMES) or shard_of(key) is not None


def shard_of(key: str) -> int | None:
    """Return the shard that a key belongs to, as its record, note, table or part of an array; None for other keys.

    >>> shard_of("commits/000007.json"), shard_of("topk_ids/c/7/0"), shard_of("commits/7.json"), shard_of("notes.md")
    (7, 7, None, None)
    """
    for pattern in _SHARD_KEYS:
        if (match := pattern.fullmatch(key)) and match[1].isascii():
            shard = int(match[1])
            digits = f"{shard:06d}" if pattern is not _SHARD_KEYS[2] else str(shard)
            return shard if digits == match[1] and shard < 2**31 else None
    return None
