"""A capture's settings in, a cache out: plans, begins the cache, has its shards captured, and seals it."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from todi_offline.cache.planning import ShardPlan
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.capturing.config import CaptureConfig, CaptureSummary, Progress
from todi_offline.capturing.engines import Engine
from todi_offline.capturing.in_process import capture_in_process
from todi_offline.capturing.jobs import Job, plan_job, tasks_of
from todi_offline.capturing.loading import load_engine
from todi_offline.capturing.work import ShardWorker, Work
from todi_offline.config import load_config
from todi_offline.data import Examples, load_examples
from todi_offline.errors import memory_errors
from todi_offline.models import load_tokenizer
from todi_offline.teacher import Teacher


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
    with contextlib.closing(load_engine(config, teacher)) as engine:
        job = plan_job(config, engine.describe(), examples)
        return _capture(job, engine, progress)


def _capture(job: Job, engine: Engine, progress: Progress | None) -> CaptureSummary:
    with CacheWriter(job.config.out, job.plan.manifest, job.described.tokenizer_json) as writer:
        missing = set(writer.missing_shards())
        own = [shard for shard in job.plan.shards if shard.index in missing]
        worker = ShardWorker(engine, writer.shards, job.reused)
        report = _reporter(job, own, progress)
        work = [result.work for result in capture_in_process(worker, tasks_of(job, own), report)]
        if own or not missing:  # else this part is finished, and another one is not
            writer.seal()
    return _summarise(job, work)


def _tokenizer_of(config: CaptureConfig) -> Any:
    return load_tokenizer(config.teacher.teacher, trust_remote_code=config.teacher.trust_remote_code)


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
