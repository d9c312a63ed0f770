"""Small caches of a made-up teacher: real softmaxes over a small vocabulary, in shards of the smallest size."""

from pathlib import Path
from typing import Any

import numpy as np

from todi_offline.cache.encoding import TargetRows
from todi_offline.cache.layout import CacheSettings
from todi_offline.cache.manifest import Manifest
from todi_offline.cache.writer import CacheWriter, SequenceRows

VOCAB = 300


def settings(**changes: Any) -> CacheSettings:
    return CacheSettings(**({"k": 6, "tail_samples": 3, "shard_tokens": 4096} | changes))


def manifest(chosen: CacheSettings, vocab_size: int = VOCAB) -> Manifest:
    teacher = {"model_type": "fake", "num_parameters": 1, "dtype": "float32"}
    tokenizer = {"vocabulary": "a", "merges": "b"}
    data = {"source": "fake", "split": None}
    return Manifest(
        settings=chosen, vocab_size=vocab_size, teacher=teacher, tokenizer=tokenizer, data=data, versions={"torch": "0"}
    )


def sequence(number: int, chosen: CacheSettings, vocab_size: int = VOCAB) -> SequenceRows:
    """Return a sequence that its number decides: tokens, mask, and what a softmax over random logits keeps."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(8, 120))
    token_ids = rng.integers(0, vocab_size, length).astype(np.uint32)
    mask = rng.random(length) < 0.7
    mask[0], mask[-1] = True, False
    labels = token_ids[np.flatnonzero(mask) + 1].astype(np.int64)
    logits = rng.normal(0, 3, (len(labels), vocab_size)).astype(np.float32)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : chosen.k]
    tail = logprobs.copy()
    np.put_along_axis(tail, ids, -np.inf, axis=1)
    drawn = np.argmax(tail, axis=1)[:, None].repeat(chosen.tail_samples, axis=1)
    rows = TargetRows(
        ids=ids.astype(np.uint32),
        logprobs=np.take_along_axis(logprobs, ids, axis=1),
        tail_logsumexp=np.stack([np.logaddexp.reduce(tail / t, axis=1) for t in chosen.temperatures], axis=1),
        label_logprob=np.take_along_axis(logprobs, labels[:, None], axis=1)[:, 0],
        temperatures=chosen.temperatures,
        tail_temperature=chosen.tail_temperature,
        tail_ids=drawn.astype(np.uint32) if chosen.tail_samples else None,
        tail_logprobs=np.take_along_axis(logprobs, drawn, axis=1) if chosen.tail_samples else None,
    )
    return SequenceRows(f"fake:{number}", "fake", token_ids, mask, rows)


def write_cache(root: Path, num_shards: int = 2, per_shard: int = 12, *, seal: bool = True, **changes: Any) -> Path:
    """Write a cache; its sequences are numbered from 0 through the shards."""
    chosen = settings(**changes)
    with CacheWriter(root, manifest(chosen), num_shards) as writer:
        for shard in writer.missing_shards():
            numbers = range(shard * per_shard, (shard + 1) * per_shard)
            writer.write_shard(shard, [sequence(number, chosen) for number in numbers])
        if seal:
            writer.seal()
    return root
