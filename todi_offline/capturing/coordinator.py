"""A capture's settings in, a cache out: plans, begins the cache, has its shards captured, and seals it."""

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from todi_offline.cache.format.notes import Note
from todi_offline.cache.planning import CapturePlan, ShardPlan
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.cache.writer import CacheWriter
from todi_offline.capturing.attempts import Attempts
from todi_offline.capturing.config import CaptureConfig, CaptureSummary
from todi_offline.capturing.jobs import Job, require_targets
from todi_offline.capturing.meter import CaptureProgress, Meter, Progress, Report
from todi_offline.capturing.notes import Notes
from todi_offline.capturing.ranks import Ranks, join_ranks
from todi_offline.capturing.work import ShardResult, Work
from todi_offline.capturing.workers import Workers, start_workers
from todi_offline.config import Setting, load_config
from todi_offline.data import Examples, load_examples
from todi_offline.errors import memory_errors
from todi_offline.models.loading import Tokenizer, load_tokenizer, num_known_ids
from todi_offline.teacher.in_transformers import Teacher

logger = logging.getLogger(__name__)

_NUM_WARNINGS = 10


def capture(
    teacher: "str | Teacher | None" = None,
    data: "str | Examples | None" = None,
    out: "str | Path | None" = None,
    *,
    config: CaptureConfig | Path | None = None,
    progress: Progress | None = None,
    **settings: Setting,
) -> CaptureSummary:
    """Run a teacher once over a data set and keep its sparse targets in a cache.

    `config` is a `CaptureConfig` or its TOML file. Settings passed by name override it: teacher, data and out, and the
    fields of the config's tables (`k=64`, `max_length=2048`, ...). The same call resumes a capture that was stopped. To
    a finished cache of other data, a capture appends the sequences that the cache lacks, as a new part. `reuse` names
    caches of the same teacher, from which sequences are copied instead of captured.

    Raises:
        TodiError: a setting, the data, the teacher or the folder cannot be used; see `todi_offline.errors`.
    """
    loaded = teacher if isinstance(teacher, Teacher) else None
    examples = data if isinstance(data, Examples) else None
    named: dict[str, Any] = {"teacher": "(given)" if loaded else teacher, "out": out}
    named |= {} if examples else {"data": data}
    settings |= {name: value for name, value in named.items() if value is not None}
    return _capture(load_config(CaptureConfig, config, settings), loaded, examples, progress)


@memory_errors("committed work is safe; lower batch_tokens, and run the same command again")
def _capture(
    config: CaptureConfig, teacher: Teacher | None, examples: Examples | None, progress: Progress | None
) -> CaptureSummary:
    """Load what is not given, plan, copy and capture what is not committed yet, seal.

    Every rank of a job of torchrun or accelerate runs this; rank 0 alone plans, locks, begins and seals the cache.
    """
    with join_ranks(config.teacher.device, config.teacher.tp) as ranks, contextlib.ExitStack() as stack:
        if examples is None:  # before the teacher: wrong data are refused at once
            examples = ranks.node_by_node(lambda: _load_examples(config, teacher))
        workers = stack.enter_context(
            ranks.together(lambda: start_workers(config, ranks.name, teacher, commits=ranks.commits))
        )
        described = ranks.together(workers.describe)
        job = Job.of(examples, described, config.cache)
        ranks.require_same(job.manifest.to_json())
        plan = ranks.first(lambda: job.plan(config))
        writer = CacheWriter(config.out, plan.manifest, described.tokenizer_json)
        begun = ranks.first(lambda: _begin(plan, stack.enter_context(writer)))
        with ranks.metered(Meter(_progress(job, plan, begun.missing), progress)) as report:
            work = _work(config, job, plan, begun, ranks, workers, report)
        work = {name: part for works in ranks.gather(work) for name, part in works.items()}
        return ranks.first(lambda: _finish(config, job, plan, writer, work))


def _load_examples(config: CaptureConfig, teacher: Teacher | None) -> Examples:
    """Tokenise the data; targets that no vocabulary of the tokenizer's size has are refused first."""
    tokenizer = _tokenizer(config, teacher)
    require_targets(num_known_ids(tokenizer), config.cache)
    return load_examples(config.data, tokenizer)


def _tokenizer(config: CaptureConfig, teacher: Teacher | None) -> Tokenizer:
    if teacher is not None:
        return teacher.tokenizer
    return load_tokenizer(config.teacher.teacher, trust_remote_code=config.teacher.trust_remote_code)


@dataclass(frozen=True, slots=True)
class _Begun:
    """What is left to do of a plan."""

    missing: list[ShardPlan]
    """The shards of the plan that the cache lacks."""
    notes: Mapping[int, Note]
    """What earlier runs have left where they died, by shard."""
    shards: ShardWriter

    def rounds(self, *, splits_teacher: bool) -> tuple[list[ShardPlan], ...]:
        """Return the missing shards in the order of their capture: those at which a run died come last.

        A teacher that is split over processes dies as a whole, and leaves no notes.
        """
        if splits_teacher:
            return (self.missing,)
        suspects = [shard for shard in self.missing if shard.index in self.notes]
        suspects.sort(key=lambda shard: len(self.notes[shard.index].ended))
        return [shard for shard in self.missing if shard.index not in self.notes], suspects


def _begin(plan: CapturePlan, writer: CacheWriter) -> _Begun:
    """Return what is left to do of a plan."""
    missing = set(writer.missing_shards())
    return _Begun([shard for shard in plan.shards if shard.index in missing], writer.notes(), writer.shards)


def _work(
    config: CaptureConfig,
    job: Job,
    plan: CapturePlan,
    begun: _Begun,
    ranks: Ranks,
    workers: Workers,
    report: Report,
) -> dict[str, Work]:
    """Have all missing shards captured; return what each worker of this rank did.

    A shard at which an earlier run died is begun when all ranks have committed the others.

    Raises:
        TodiError: a shard cannot be captured.
    """
    uses_actors, splits_teacher = config.ray.ray_actors > 0, ranks.is_one_worker
    work: dict[str, Work] = {}
    for shards in filter(None, begun.rounds(splits_teacher=splits_teacher)):
        notes = None if uses_actors or splits_teacher else Notes(begun.shards)
        attempts = Attempts(
            job.attempts(plan, ranks.share(shards), {} if splits_teacher else begun.notes),
            config.ray.ray_attempts,
            lambda shard, number: job.name_in(plan, shard, number),
            skip_failed=config.skip_failed,
            notes=notes,
        )
        results = workers.capture(begun.shards, attempts, report)
        with ranks.before_sigterm(notes.stop) if notes else contextlib.nullcontext():
            ranks.together(functools.partial(_add_work, work, results, notes))
    return work


def _progress(job: Job, plan: CapturePlan, missing: Sequence[ShardPlan]) -> CaptureProgress:
    """Return how far a capture is as it begins."""
    num_tokens = job.examples.num_tokens
    left = sum(int(num_tokens[plan.sequences[shard.start : shard.stop]].sum()) for shard in missing)
    total = int(num_tokens.sum())
    return CaptureProgress(total - left, total, len(plan.shards) - len(missing), len(plan.shards))


def _add_work(work: dict[str, Work], results: Iterable[ShardResult], notes: Notes | None) -> None:
    """Have shards captured; add up what each worker did."""
    with notes or contextlib.nullcontext():
        for result in results:
            work[result.worker] = Work.total((work.get(result.worker, Work()), result.work))


def _left_out(cache: Cache) -> dict[str, str]:
    return {example: reason for part in cache.manifest.parts for example, reason in part.left_out.items()}


def _warn_of(left_out: dict[str, str]) -> None:
    """Say which examples a cache lacks."""
    for example, reason in list(left_out.items())[:_NUM_WARNINGS]:
        logger.warning("example %r is left out: %s", example, reason)
    if len(left_out) > _NUM_WARNINGS:
        logger.warning("... and %d more; `todi-cache inspect --json` has all of them", len(left_out) - _NUM_WARNINGS)


def _finish(
    config: CaptureConfig, job: Job, plan: CapturePlan, writer: CacheWriter, work: Mapping[str, Work]
) -> CaptureSummary:
    """Seal the cache, unless this capture had nothing to do and another one is not finished, and sum up."""
    if work or not writer.missing_shards():
        writer.seal()
    cache, done = open_cache(config.out), Work.total(work.values())
    num_targets, left_out = int(cache.num_targets.sum()), _left_out(cache)
    _warn_of(left_out)
    return CaptureSummary(
        num_sequences=len(cache),
        num_tokens=int(cache.num_tokens.sum()),
        num_targets=num_targets,
        num_captured_tokens=done.num_captured_tokens,
        num_captured_targets=done.num_captured_targets,
        num_reused_targets=done.num_reused_targets,
        num_known_sequences=len(job.examples) - len(plan.sequences),
        teacher_seconds=done.teacher_seconds,
        bytes_per_target=sum(cache.bytes_by_array.values()) / num_targets,
        mean_topk_mass=float(np.average(cache.columns["topk_mass"], weights=cache.num_targets)),
        left_out=left_out,
        data_report=job.examples.report,
        workers=dict(work),
    )
