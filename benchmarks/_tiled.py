"""A few sequences, real or made up, in; a cache of any size out."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.keys import content_key
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence, SequenceRows
from todi_offline.cache.objects import read_table
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter

VOCAB = 49_152
_NUM_MADE_UP = 24


def tiled_cache(out: Path, num_targets: int, cache: str | None, **settings: Any) -> str:
    """Write a cache of at least so many targets, the sequences of `cache` again and again; return what they are.

    Without a cache they are made up: a unigram distribution like Zipf's times log-normal noise, vocabulary 49,152.
    `settings` are those of the cache that is written; by default the given cache's, or K = 64 with 8 samples.
    """
    if cache is None:
        defaults: dict[str, Any] = {"k": 64, "tail_samples": 8, "encoding": "f16"}
        chosen = CacheSettings(**(defaults | settings))
        rows = [_made_up(number, chosen) for number in range(_NUM_MADE_UP)]
        manifest = _manifest(chosen, VOCAB)
    else:
        opened = open_cache(cache)
        chosen = dataclasses.replace(opened.manifest.settings, **settings)
        manifest = _manifest(chosen, opened.manifest.vocab_size)
        rows = [_narrowed(str(number), sequence, chosen) for number, sequence in enumerate(opened)]
    shard = _fill(rows, manifest.settings.shard_tokens)
    num_shards = -(-num_targets // sum(len(sequence.targets) for sequence in shard))
    part = dataclasses.replace(manifest.parts[0], num_sequences=num_shards * len(shard), num_shards=num_shards)
    with CacheWriter(out, dataclasses.replace(manifest, parts=(part,))) as writer:
        first = writer.write_shard(0, shard)
        table = read_table(writer.store, first)
        for number in range(1, num_shards):
            writer.link_shard(number, writer.store, first, table)
        writer.seal()
    return "made up" if cache is None else f"the {len(rows)} sequences of a cache"


def plain_tokenizer(vocab_size: int) -> Any:
    """Return the tokenizer that these caches name: its words are numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1")


def _narrowed(name: str, sequence: CachedSequence, settings: CacheSettings) -> SequenceRows:
    key = content_key(sequence.token_ids, sequence.target_mask)
    targets = narrow(sequence.targets, settings, key)
    return SequenceRows(name, "a cache", sequence.token_ids, sequence.target_mask, targets)


def _fill(rows: list[SequenceRows], shard_tokens: int) -> list[SequenceRows]:
    """Return as many as fill a shard, going round."""
    shard, used = list[SequenceRows](), 0
    for sequence in _round(rows):
        used += len(sequence.token_ids)
        if used > shard_tokens:
            return shard
        shard.append(dataclasses.replace(sequence, id=f"{sequence.id}/{len(shard)}"))
    raise AssertionError("a round without end")


def _round(rows: list[SequenceRows]) -> Iterator[SequenceRows]:
    while True:
        yield from rows


def _made_up(number: int, settings: CacheSettings) -> SequenceRows:
    rng = np.random.default_rng(number)
    length = int(rng.integers(60, 400))
    mask = np.arange(length) >= length // 3
    mask[-1] = False
    count = int(mask.sum())
    logits = rng.normal(0, 2.5, (count, VOCAB)).astype(np.float32)
    logits -= np.log(np.random.default_rng(0).permutation(VOCAB) + 10).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits, dtype=np.float64).sum(axis=1, keepdims=True)).astype(np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, others = order[:, : settings.k], order[:, settings.k :]
    labels = order[np.arange(count), rng.zipf(1.7, count).clip(max=VOCAB) - 1]
    token_ids = rng.integers(0, VOCAB, length).astype(np.uint32)
    token_ids[np.flatnonzero(mask) + 1] = labels
    drawn = _drawn(rng, logprobs, others, settings.tail_samples)
    tail = np.take_along_axis(logprobs, others, axis=1)
    sums = [np.log(np.exp(tail / t, dtype=np.float64).sum(axis=1)) for t in settings.temperatures]
    rows = TargetRows(
        ids=ids.astype(np.uint32),
        logprobs=np.take_along_axis(logprobs, ids, axis=1),
        tail_logsumexp=np.stack(sums, axis=1).astype(np.float32),
        label_logprob=np.take_along_axis(logprobs, labels[:, None], axis=1)[:, 0],
        temperatures=settings.temperatures,
        tail_ids=drawn.astype(np.uint32) if settings.tail_samples else None,
        tail_logprobs=np.take_along_axis(logprobs, drawn, axis=1) if settings.tail_samples else None,
    )
    return SequenceRows(f"made-up:{number}", "made up", token_ids, mask, rows)


def _drawn(
    rng: np.random.Generator, logprobs: npt.NDArray[np.float32], others: npt.NDArray[np.int64], samples: int
) -> npt.NDArray[np.int64]:
    """Draw ids from each row's tail."""
    cumulative = np.cumsum(np.exp(np.take_along_axis(logprobs, others, axis=1), dtype=np.float64), axis=1)
    reached = rng.random((len(others), samples)) * cumulative[:, -1:]
    places = np.stack([np.searchsorted(row, values) for row, values in zip(cumulative, reached, strict=True)])
    return np.take_along_axis(others, places.clip(max=others.shape[1] - 1), axis=1)


def _manifest(settings: CacheSettings, vocab_size: int) -> Manifest:
    part = Part(recipe={"source": "made up"}, content="", num_sequences=0, num_shards=0, versions={})
    return Manifest(
        settings=settings,
        vocab_size=vocab_size,
        teacher={"model_type": "made up"},
        tokenizer=tokenizer_fingerprint(plain_tokenizer(vocab_size)),
        parts=(part,),
    )
