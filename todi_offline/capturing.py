"""Stage 1: a teacher and a data set in, a cache out."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.planning import CapturePlan, ShardPlan, plan_capture
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.cache.writer import CacheWriter
from todi_offline.config import load_config
from todi_offline.data import DataConfig, Example, Examples, load_examples
from todi_offline.errors import CacheCorruptError, memory_errors
from todi_offline.models import Tokenizer, load_tokenizer
from todi_offline.teacher import (
    Teacher,
    TeacherConfig,
    length_batches,
    load_teacher,
    num_positions,
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
    """Where the cache is written: a folder or URL. A finished cache of other data is appended to."""
    reuse: tuple[str, ...] = ()
    """Caches of the same teacher whose sequences are copied where their content is met, and not captured again."""
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
    num_captured_targets: int
    """Targets that this run computed."""
    num_reused_targets: int
    """Targets that this run copied from other caches."""
    num_known_sequences: int
    """Sequences of the data set that the cache held already, from the capture of other data."""
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
    too. The same call again goes on where the last one was stopped. A finished cache of other data is appended to: the
    sequences whose content it lacks become a part of their own. With `reuse`, names of caches of the same teacher,
    sequences that these hold are copied.

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
    """Load what is not given, plan, copy and capture what is not committed yet, seal."""
    if examples is None:  # before the teacher: wrong data are refused at once
        examples = load_examples(config.data, teacher.tokenizer if teacher else _tokenizer_of(config.teacher))
    teacher = teacher or load_teacher(config.teacher)
    manifest = describe(teacher, config.cache)
    reused = open_reusable(config.reuse, manifest)
    keys = examples.content_keys()
    manifest = dataclasses.replace(manifest, parts=(_part(examples, keys),))
    plan = plan_capture(open_store(config.out), manifest, keys, examples.num_tokens)
    places = np.full(len(keys), -1) if reused is None else reused.content_keys.find(keys)
    job = _Job(config, teacher, examples, plan, reused, places)
    with CacheWriter(config.out, plan.manifest, tokenizer_json(teacher.tokenizer)) as writer:
        missing = set(writer.missing_shards())
        own = [shard for shard in plan.shards if shard.index in missing]
        tally = _capture_shards(writer, own, job, progress)
        if own or not missing:  # else this part is finished, and another one is not
            writer.seal()
    return _summarise(job, tally)


def _tokenizer_of(config: TeacherConfig) -> Tokenizer:
    return load_tokenizer(config.teacher, trust_remote_code=config.trust_remote_code)


def describe(teacher: Teacher, settings: CacheSettings) -> Manifest:
    """Return the manifest of a cache of this teacher that has no part yet."""
    return Manifest(
        settings=settings,
        vocab_size=teacher.vocab_size,
        teacher=teacher_fingerprint(teacher),
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        parts=(),
    )


def _part(examples: Examples, keys: ContentKeys) -> Part:
    """Describe a data set as a capture of all of it."""
    return Part(
        recipe=json.loads(json.dumps(examples.recipe)),
        content=keys.digest(),
        num_sequences=len(examples),
        num_shards=0,
        versions={name: version(name) for name in _RECORDED},
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What a capture has to do, and from what."""

    config: CaptureConfig
    teacher: Teacher
    examples: Examples
    plan: CapturePlan
    reused: Cache | None
    places: npt.NDArray[np.int64]
    """Where `reused` has each example, or -1."""


@dataclass(slots=True)
class _Tally:
    """What a capture has done so far."""

    captured_tokens: int = 0
    captured_targets: int = 0
    reused_targets: int = 0
    teacher_seconds: float = 0.0


def capture_shard(
    teacher: Teacher,
    examples: Sequence[Example],
    settings: CacheSettings,
    batch_tokens: int,
    report: Callable[[int], None] = lambda _: None,
    known: Mapping[int, TargetRows] | None = None,
) -> list[SequenceRows]:
    """Return the rows of one shard, in the order of its examples; of those that are `known` by number, as given."""
    rows = dict(known or {})
    unknown = [index for index in range(len(examples)) if index not in rows]
    lengths = [len(examples[index].token_ids) for index in unknown]
    report(sum(len(example.token_ids) for example in examples) - sum(lengths))
    for batch in length_batches(lengths, batch_tokens, num_positions(teacher)):
        members = [unknown[index] for index in batch]
        rows |= zip(members, targets_of(teacher, [examples[index] for index in members], settings), strict=True)
        report(sum(lengths[index] for index in batch))
    return [
        SequenceRows(example.id, example.source, example.token_ids, example.target_mask, rows[index])
        for index, example in enumerate(examples)
    ]


def _capture_shards(writer: CacheWriter, shards: Sequence[ShardPlan], job: _Job, progress: Progress | None) -> _Tally:
    """Capture shards, writing each behind the teacher's work on the next."""
    num_tokens, members_of = job.examples.num_tokens, job.plan.sequences
    total, tally = int(num_tokens.sum()), _Tally()
    done = total - sum(int(num_tokens[members_of[shard.start : shard.stop]].sum()) for shard in shards)

    def report(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        if progress:
            progress(done, total)

    report(0)
    with ThreadPoolExecutor(1) as background:
        writing = None
        for shard in shards:
            rows = _shard_rows(job, members_of[shard.start : shard.stop].tolist(), report, tally)
            if writing is not None:
                writing.result()
            writing = background.submit(writer.write_shard, shard.index, rows)
        if writing is not None:
            writing.result()
    return tally


def _shard_rows(job: _Job, members: list[int], report: Callable[[int], None], tally: _Tally) -> list[SequenceRows]:
    """Copy and capture the rows of the examples with these numbers, and count them."""
    examples = [job.examples[index] for index in members]
    held = [place for place, index in enumerate(members) if job.places[index] >= 0]
    known = {place: _copied(job, members[place], examples[place]) for place in held}
    started = perf_counter()
    rows = capture_shard(job.teacher, examples, job.config.cache, job.config.teacher.batch_tokens, report, known)
    tally.teacher_seconds += perf_counter() - started
    captured = [row for place, row in enumerate(rows) if place not in known]
    tally.captured_tokens += sum(len(row.token_ids) for row in captured)
    tally.captured_targets += sum(len(row.targets) for row in captured)
    tally.reused_targets += sum(map(len, known.values()))
    return rows


def _copied(job: _Job, index: int, example: Example) -> TargetRows:
    """Read the targets of an example from a cache that has them.

    Raises:
        CacheCorruptError: it has them under the example's content key, and for other tokens.
    """
    assert job.reused is not None, "it has a place there"
    found = job.reused[int(job.places[index])]
    if not np.array_equal(found.token_ids, example.token_ids) or not np.array_equal(
        found.target_mask, example.target_mask
    ):
        raise CacheCorruptError(
            f"{job.reused.root} has other tokens under the content key of {example.id!r}; run `todi-cache verify`"
        )
    return found.targets


def _summarise(job: _Job, tally: _Tally) -> CaptureSummary:
    cache = open_cache(job.config.out)
    num_targets = int(cache.num_targets.sum())
    return CaptureSummary(
        num_sequences=len(cache),
        num_tokens=int(cache.num_tokens.sum()),
        num_targets=num_targets,
        num_captured_tokens=tally.captured_tokens,
        num_captured_targets=tally.captured_targets,
        num_reused_targets=tally.reused_targets,
        num_known_sequences=len(job.examples) - len(job.plan.sequences),
        teacher_seconds=tally.teacher_seconds,
        bytes_per_target=sum(cache.bytes_by_array.values()) / num_targets,
        mean_topk_mass=float(np.average(cache.columns["topk_mass"], weights=cache.num_targets)),
        data_report=job.examples.report,
    )
