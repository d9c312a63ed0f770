"""The settings of a capture in; its work, time, bytes and files out, and those of training a student from it."""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import array_specs
from todi_offline.cache.objects import committed_shards, has_cache, read_root
from todi_offline.cache.planning import CapturePlan
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.cache.writer import require_place
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import TeacherDescription
from todi_offline.capturing.jobs import Job
from todi_offline.capturing.loading import load_engine
from todi_offline.config import Setting, as_tables, load_config
from todi_offline.costing.choices import Work, choices_of, reason, shapes_of, suggested
from todi_offline.costing.probing import draw, measure, widest
from todi_offline.costing.results import Duration, Plan, StudentPlan
from todi_offline.costing.sizes import ADAM_BYTES, BACKWARD, ModelSize, read_size
from todi_offline.costing.storage import amount_of
from todi_offline.data import Examples, load_examples
from todi_offline.errors import ConfigError
from todi_offline.models.loading import Tokenizer, load_tokenizer, num_known_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The options of a plan, beside the settings of the capture."""

    probe: int = 0
    """Sequences that the teacher reads to measure time, bytes and kept mass; 0 does not load the teacher."""
    probe_seed: int = 0
    """Seed that chooses the sequences of `probe`."""
    rate: float | None = None
    """Tokens a second that the teacher reads on the machine of the capture, if you know this rate."""
    student: str | None = None
    """A student to train from the cache: a folder or hub id."""
    epochs: float = 3.0
    """The student's passes over the cache."""
    batch_size: int = 8
    """Sequences in a training step, on all devices together."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ConfigError: a value is out of range.
        """
        if self.probe < 0 or self.probe_seed < 0 or self.batch_size < 1:
            raise ConfigError(
                f"probe is {self.probe}, probe_seed {self.probe_seed} and batch_size {self.batch_size}; expected at "
                "least 0, 0 and 1"
            )
        for name in ("rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; expected a number above 0")


def plan(
    teacher: str | None = None,
    data: str | None = None,
    *,
    config: CaptureConfig | Path | None = None,
    stage: Callable[[str], None] = lambda _: None,
    **settings: Setting,
) -> Plan:
    """Say what a capture with these settings will cost, and what training a student from it will.

    Takes the config and the settings of `capture`, and the fields of `PlanOptions`. Without `out`, the plan is for a
    new cache. Without `probe`, the teacher is not loaded; the plan then assumes that the cache at `out` and the caches
    in `reuse` are of this teacher. `stage` is called with the name of each stage.

    Raises:
        TodiError: what `capture` would raise with these settings before its first batch.
    """
    own = {field.name for field in dataclasses.fields(PlanOptions)}
    options = load_config(PlanOptions, None, {name: value for name, value in settings.items() if name in own})
    rest: dict[str, Any] = {name: value for name, value in settings.items() if name not in own}
    rest |= {name: value for name, value in {"teacher": teacher, "data": data}.items() if value is not None}
    with tempfile.TemporaryDirectory() as empty:
        if "out" not in rest and "out" not in as_tables(config):
            rest["out"] = empty
        return _plan(load_config(CaptureConfig, config, rest), options, stage)


def _plan(config: CaptureConfig, options: PlanOptions, stage: Callable[[str], None]) -> Plan:
    stage("Reading the data set")
    tokenizer = load_tokenizer(config.teacher.teacher, trust_remote_code=config.teacher.trust_remote_code)
    vocab_size = num_known_ids(tokenizer)
    examples = load_examples(config.data, tokenizer)
    size = read_size(config.teacher.teacher, vocab_size)
    with contextlib.ExitStack() as stack:
        work = _work(config, options, examples, tokenizer, vocab_size, stage, stack)
    read_tokens, read_targets = examples.num_tokens[work.unread], int(examples.num_targets[work.unread].sum())
    flops = size.forward_flops(read_tokens, read_targets)
    duration = _duration(work, options, size, flops, int(read_tokens.sum()))
    choices = suggested(choices_of(work))
    asked_bytes = next((choice.total_bytes for choice in choices if choice.is_asked), None)
    return Plan(
        report=examples.report,
        amount=work.amount,
        num_known_sequences=len(examples) - len(work.plan.sequences),
        num_read_sequences=len(work.unread),
        num_read_tokens=int(read_tokens.sum()),
        num_read_targets=read_targets,
        teacher=size,
        weight_bytes=size.weight_bytes(config.teacher.dtype),
        peak_bytes=work.probe.peak_bytes if work.probe else None,
        flops=flops,
        duration=duration,
        choices=choices,
        suggestion=reason(choices),
        num_files=_num_files(work, tokenizer),
        shard_bytes=None if asked_bytes is None else round(asked_bytes / max(work.amount.num_shards, 1)),
        shard_memory_bytes=config.cache.shard_tokens * config.cache.target_bytes,
        student=_student(options, work, flops, duration),
    )


def _work(
    config: CaptureConfig,
    options: PlanOptions,
    examples: Examples,
    tokenizer: Tokenizer,
    vocab_size: int,
    stage: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> Work:
    """Plan the shards as a capture does, and probe the teacher where that is asked for; `stack` closes its engine."""
    store = open_store(config.out)
    require_place(store)
    engine, setup_seconds = None, 0.0
    if options.probe:
        stage("Loading the teacher")
        started = perf_counter()
        engine = stack.enter_context(contextlib.closing(load_engine(config)))
        described = engine.describe()
        setup_seconds = perf_counter() - started
    else:
        described = _presumed(config, tokenizer, vocab_size)
    job = Job.of(examples, described, config.cache)
    plan = job.plan(config)
    unread = _unread(config, job, plan)
    probe = None
    if engine is not None and len(plan.sequences):
        chosen = draw(unread if len(unread) else plan.sequences, options.probe, options.probe_seed)
        stage(f"The teacher reads {len(chosen):,} sequences")
        wide = widest(config.cache, shapes_of(vocab_size, config.cache))
        probe = measure(engine, examples, chosen.tolist(), (config.cache, wide), vocab_size)
    own = plan.sequences
    amount = amount_of(examples.num_tokens[own], examples.num_targets[own], [shard.start for shard in plan.shards])
    return Work(config, vocab_size, examples, plan, amount, unread, probe, setup_seconds)


def _presumed(config: CaptureConfig, tokenizer: Tokenizer, vocab_size: int) -> TeacherDescription:
    """Describe a teacher that is not loaded: as that of the caches named, which are taken to be its own."""
    stores = [open_store(place) for place in (config.out, *config.reuse)]
    known = next((read_root(store).manifest.teacher for store in stores if has_cache(store)), {})
    return TeacherDescription(vocab_size, dict(known), tokenizer_fingerprint(tokenizer), None)


def _unread(config: CaptureConfig, job: Job, plan: CapturePlan) -> npt.NDArray[np.int64]:
    """Return the sequences that lie in no committed shard and in no cache to reuse."""
    store = open_store(config.out)
    committed = set(committed_shards(store)) if has_cache(store) else set[int]()
    missing = [plan.sequences[shard.start : shard.stop] for shard in plan.shards if shard.index not in committed]
    unread = np.concatenate([np.empty(0, np.int64), *missing])
    reusable = open_reusable(config.reuse, job.manifest)
    return unread if reusable is None else unread[reusable.content_keys.find(job.keys[unread]) < 0]


def _duration(work: Work, options: PlanOptions, size: ModelSize, flops: float, num_tokens: int) -> Duration | None:
    """Return how long the capture takes: in proportion to FLOPs of the probe, or to tokens at a rate."""
    workers = max(work.config.ray.ray_actors, 1)
    shared = f", on {workers} actors" if workers > 1 else ""
    if options.rate is not None:
        return Duration(
            num_tokens / options.rate / workers, f"at {options.rate:,.0f} tokens a second, as given{shared}"
        )
    if work.probe is None or not num_tokens:
        return None
    probe = work.probe
    probed = size.forward_flops(probe.num_tokens, probe.num_targets)
    per_target = probe.write_seconds / probe.num_targets
    last_shard = per_target * work.amount.num_targets / work.amount.num_shards
    reading = max(probe.teacher_seconds * flops / probed, per_target * work.amount.num_targets)
    read = f"{len(probe.sequences):,} sequences, {probe.num_tokens.sum():,} tokens in {probe.teacher_seconds:.1f} s"
    return Duration(work.setup_seconds + reading / workers + last_shard, f"measured here: {read}{shared}")


def _num_files(work: Work, tokenizer: Tokenizer) -> int:
    """Return the objects that the capture adds: those of its shards, and of a new cache its metadata."""
    arrays = len(array_specs(work.config.cache, work.vocab_size))
    in_shards = work.amount.num_shards * (arrays + 2)  # its sequence table and its commit record
    if has_cache(open_store(work.config.out)):
        return in_shards
    has_tokenizer = getattr(tokenizer, "backend_tokenizer", None) is not None
    return in_shards + arrays + 2 + has_tokenizer  # cache.json and zarr.json


def _student(
    options: PlanOptions, work: Work, teacher_flops: float, teacher_duration: Duration | None
) -> StudentPlan | None:
    """Return what training takes: in proportion to FLOPs at the teacher's own rate."""
    if options.student is None:
        return None
    size, own = read_size(options.student, work.vocab_size), work.plan.sequences
    num_tokens = work.examples.num_tokens[own]
    flops = BACKWARD * options.epochs * size.forward_flops(num_tokens, work.amount.num_targets)
    duration = None
    if teacher_duration is not None and teacher_flops:
        rate = teacher_flops / max(teacher_duration.seconds - work.setup_seconds, 1e-9)
        duration = Duration(flops / rate, f"at the teacher's {rate / 1e9:,.3g} GFLOP/s, {teacher_duration.basis}")
    return StudentPlan(
        size.num_parameters,
        math.ceil(math.ceil(len(own) / options.batch_size) * options.epochs),
        flops,
        duration,
        size.num_parameters * ADAM_BYTES,
    )
