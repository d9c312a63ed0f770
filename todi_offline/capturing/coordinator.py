"""A capture's settings in, a cache out: plans, begins the cache, has its shards captured, and seals it."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.planning import CapturePlan, ShardPlan, plan_capture
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.cache.writer import CacheWriter
from todi_offline.capturing.config import CaptureConfig, CaptureSummary, Progress
from todi_offline.capturing.engines import Engine, TeacherDescription, TransformersEngine
from todi_offline.capturing.in_process import capture_in_process
from todi_offline.capturing.work import ShardTask, ShardWorker, Work
from todi_offline.config import load_config
from todi_offline.data import Examples, load_examples
from todi_offline.errors import memory_errors
from todi_offline.models import load_tokenizer
from todi_offline.teacher import Teacher, load_teacher

_RECORDED = ("todi-offline", "numpy", "pyarrow", "numcodecs", "pcodec")


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
        examples = load_examples(config.data, teacher.tokenizer if teacher else _tokenizer_of(config))
    engine = load_engine(config, teacher)
    job = plan_job(config, engine.describe(), examples)
    with CacheWriter(config.out, job.plan.manifest, job.described.tokenizer_json) as writer:
        missing = set(writer.missing_shards())
        own = [shard for shard in job.plan.shards if shard.index in missing]
        worker = ShardWorker(engine, writer.shards, job.reused)
        report = _reporter(job, own, progress)
        work = [result.work for result in capture_in_process(worker, tasks_of(job, own), report)]
        if own or not missing:  # else this part is finished, and another one is not
            writer.seal()
    return _summarise(job, work)


def load_engine(config: CaptureConfig, teacher: Teacher | None = None) -> Engine:
    """Return what runs the teacher, which may be given."""
    return TransformersEngine(teacher or load_teacher(config.teacher), config.teacher.batch_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """What a capture has to do, and from what."""

    config: CaptureConfig
    described: TeacherDescription
    examples: Examples
    plan: CapturePlan
    reused: Cache | None
    places: npt.NDArray[np.int64]
    """Where `reused` has each example, or -1."""


def plan_job(config: CaptureConfig, described: TeacherDescription, examples: Examples) -> Job:
    """Return what is to be captured and what is copied.

    Raises:
        CacheError: the cache or one to reuse is of another teacher, tokenizer or settings, or cannot be read.
        DataError: an example does not fit into a shard.
    """
    manifest = describe_cache(described, config.cache)
    reused = open_reusable(config.reuse, manifest)
    keys = examples.content_keys()
    manifest = dataclasses.replace(manifest, parts=(_part(examples, keys, described.versions),))
    plan = plan_capture(open_store(config.out), manifest, keys, examples.num_tokens)
    places = np.full(len(keys), -1) if reused is None else reused.content_keys.find(keys)
    return Job(config, described, examples, plan, reused, places)


def describe_cache(described: TeacherDescription, settings: CacheSettings) -> Manifest:
    """Return the manifest of a cache of this teacher that has no part yet."""
    return Manifest(
        settings=settings,
        vocab_size=described.vocab_size,
        teacher=described.teacher,
        tokenizer=described.tokenizer,
        parts=(),
    )


def tasks_of(job: Job, shards: Sequence[ShardPlan]) -> Iterator[ShardTask]:
    """Yield the work of these shards, each when it is asked for."""
    for shard in shards:
        members = job.plan.sequences[shard.start : shard.stop]
        yield ShardTask(shard.index, job.examples.to_stream(members.tolist()), tuple(job.places[members].tolist()))


def _tokenizer_of(config: CaptureConfig) -> Any:
    return load_tokenizer(config.teacher.teacher, trust_remote_code=config.teacher.trust_remote_code)


def _part(examples: Examples, keys: ContentKeys, versions: dict[str, str]) -> Part:
    """Describe a data set as a capture of all of it."""
    return Part(
        recipe=json.loads(json.dumps(examples.recipe)),
        content=keys.digest(),
        num_sequences=len(examples),
        num_shards=0,
        versions={name: version(name) for name in _RECORDED} | versions,
    )


def _reporter(job: Job, shards: Sequence[ShardPlan], progress: Progress | None) -> Callable[[int], None]:
    """Return what counts the tokens of shards that are still to be captured, and has reported those of the others."""
    num_tokens, members_of = job.examples.num_tokens, job.plan.sequences
    total = int(num_tokens.sum())
    done = total - sum(int(num_tokens[members_of[shard.start : shard.stop]].sum()) for shard in shards)

    def report(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        if progress:
            progress(done, total)

    report(0)
    return report


def _summarise(job: Job, work: Sequence[Work]) -> CaptureSummary:
    cache = open_cache(job.config.out)
    num_targets = int(cache.num_targets.sum())
    return CaptureSummary(
        num_sequences=len(cache),
        num_tokens=int(cache.num_tokens.sum()),
        num_targets=num_targets,
        num_captured_tokens=sum(each.num_captured_tokens for each in work),
        num_captured_targets=sum(each.num_captured_targets for each in work),
        num_reused_targets=sum(each.num_reused_targets for each in work),
        num_known_sequences=len(job.examples) - len(job.plan.sequences),
        teacher_seconds=sum(each.teacher_seconds for each in work),
        bytes_per_target=sum(cache.bytes_by_array.values()) / num_targets,
        mean_topk_mass=float(np.average(cache.columns["topk_mass"], weights=cache.num_targets)),
        data_report=job.examples.report,
    )
