"""Stage 1: a teacher and a data set in, a cache out."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from todi_offline.cache.fingerprint import content_key, hash_bytes, tokenizer_fingerprint
from todi_offline.cache.layout import CacheSettings
from todi_offline.cache.manifest import Manifest, Part
from todi_offline.cache.plan import ShardPlan, plan_shards
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter, SequenceRows
from todi_offline.config import load_config
from todi_offline.data import DataConfig, Example, Examples, load_examples
from todi_offline.errors import memory_errors
from todi_offline.teacher import (
    Teacher,
    TeacherConfig,
    length_batches,
    load_teacher,
    targets_of,
    teacher_fingerprint,
    tokenizer_json,
)

logger = logging.getLogger(__name__)

_RECORDED = ("todi-offline", "torch", "transformers", "numpy", "pyarrow", "numcodecs", "pcodec")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureConfig:
    """All that decides a capture."""

    out: str
    """Where the cache is written: a folder."""
    teacher: TeacherConfig
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheSettings = field(default_factory=CacheSettings)


@dataclass(frozen=True, slots=True)
class CaptureSummary:
    """What a capture did."""

    num_sequences: int
    num_tokens: int
    num_targets: int
    num_captured_tokens: int
    """Tokens that the teacher read in this run: fewer than `num_tokens` where it went on with an earlier one."""
    teacher_seconds: float
    bytes_per_target: float
    mean_topk_mass: float
    data_report: Any
    """What `load_examples` cut and dropped."""


Progress = Callable[[int, int], None]
"""Called with the tokens captured so far and those of the whole capture."""


def capture(
    teacher: "str | Teacher",
    data: "str | Examples" = "stdlib",
    out: "str | Path" = "cache",
    *,
    config: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CaptureSummary:
    """Run a teacher once over a data set and keep its sparse targets in a cache.

    `settings` are the fields of `CaptureConfig`'s tables by their own names (`k=64`, `max_length=2048`, ...); they win
    over the TOML file `config`, and so do teacher, data and out, given or not: `capture_from` takes these from a file
    too. The same call again goes on where the last one was stopped.

    Raises:
        TodiError: a setting, the data, the teacher or the folder cannot be used; see `todi_offline.errors`.
    """
    named: dict[str, Any] = {"teacher": teacher if isinstance(teacher, str) else "(given)", "out": str(out)}
    named |= {"data": data} if isinstance(data, str) else {}
    return run(
        load_config(CaptureConfig, config, {**settings, **named}),
        None if isinstance(teacher, str) else teacher,
        None if isinstance(data, str) else data,
        progress,
    )


def capture_from(path: Path | None, settings: dict[str, Any], progress: Progress | None = None) -> CaptureSummary:
    """Capture what a TOML file and settings say, the latter winning."""
    return run(load_config(CaptureConfig, path, settings), progress=progress)


@memory_errors("what is committed is safe; lower batch_tokens, and run the same command again")
def run(
    config: CaptureConfig,
    teacher: Teacher | None = None,
    examples: Examples | None = None,
    progress: Progress | None = None,
) -> CaptureSummary:
    """Load what is not given, plan, capture what is not committed yet, seal."""
    teacher = teacher or load_teacher(config.teacher)
    examples = load_examples(config.data, teacher.tokenizer) if examples is None else examples
    plan = plan_shards(examples.num_tokens.tolist(), config.cache.shard_tokens)
    manifest = describe(teacher, examples, config.cache, len(plan))
    with CacheWriter(config.out, manifest, tokenizer_json(teacher.tokenizer)) as writer:
        missing = [plan[shard] for shard in writer.missing_shards()]
        seconds = _capture_shards(writer, missing, teacher, examples, config, progress)
        if not writer.sealed:
            writer.seal()
    return _summarise(config.out, examples, missing, seconds)


def describe(teacher: Teacher, examples: Examples, settings: CacheSettings, num_shards: int) -> Manifest:
    """Return the manifest of a cache that holds this teacher's targets of these examples."""
    keys = (content_key(example.token_ids, example.target_mask) for example in examples)
    part = Part(
        recipe=examples.recipe,
        content=hash_bytes(keys),
        num_sequences=len(examples),
        num_shards=num_shards,
        versions={name: version(name) for name in _RECORDED},
    )
    return Manifest(
        settings=settings,
        vocab_size=teacher.vocab_size,
        teacher=teacher_fingerprint(teacher),
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        parts=(part,),
    )


def capture_shard(
    teacher: Teacher,
    examples: Sequence[Example],
    settings: CacheSettings,
    batch_tokens: int,
    report: Callable[[int], None] = lambda _: None,
) -> list[SequenceRows]:
    """Return the rows of one shard, in the order of its examples.

    Batches are made within the shard, so that its bytes do not depend on what was captured before it.
    """
    rows: list[SequenceRows | None] = [None] * len(examples)
    for batch in length_batches([len(example.token_ids) for example in examples], batch_tokens):
        members = [examples[index] for index in batch]
        for index, example, targets in zip(batch, members, targets_of(teacher, members, settings), strict=True):
            rows[index] = SequenceRows(example.id, example.source, example.token_ids, example.target_mask, targets)
        report(sum(len(example.token_ids) for example in members))
    return [row for row in rows if row is not None]


def _capture_shards(
    writer: CacheWriter,
    plan: list[ShardPlan],
    teacher: Teacher,
    examples: Examples,
    config: CaptureConfig,
    progress: Progress | None,
) -> float:
    """Capture shards, writing each behind the teacher's work on the next; return the teacher's seconds."""
    total = int(examples.num_tokens.sum())
    done = total - sum(int(examples.num_tokens[shard.start : shard.stop].sum()) for shard in plan)
    seconds = 0.0

    def report(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        if progress:
            progress(done, total)

    report(0)
    with ThreadPoolExecutor(1) as background:
        writing = None
        for shard in plan:
            started = perf_counter()
            members = [examples[index] for index in shard.examples]
            rows = capture_shard(teacher, members, config.cache, config.teacher.batch_tokens, report)
            seconds += perf_counter() - started
            if writing is not None:
                writing.result()
            writing = background.submit(writer.write_shard, shard.index, rows)
        if writing is not None:
            writing.result()
    return seconds


def _summarise(out: str, examples: Examples, captured: list[ShardPlan], seconds: float) -> CaptureSummary:
    cache = open_cache(out)
    num_targets = int(cache.num_targets.sum())
    mass = np.average(cache.columns["topk_mass"], weights=cache.num_targets)
    return CaptureSummary(
        num_sequences=len(cache),
        num_tokens=int(cache.num_tokens.sum()),
        num_targets=num_targets,
        num_captured_tokens=sum(int(examples.num_tokens[shard.start : shard.stop].sum()) for shard in captured),
        teacher_seconds=seconds,
        bytes_per_target=sum(cache.bytes_by_array.values()) / num_targets,
        mean_topk_mass=float(mass),
        data_report=examples.report,
    )
