"""Stage 2: a cache and a student come in; a trained student goes out. No teacher is loaded."""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import set_seed

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache, open_cache, union
from todi_offline.cache.store import open_store
from todi_offline.cache.store.staging import DEFAULT_LIMIT_GB, Staging
from todi_offline.config import Setting, as_tables, flat_fields, load_config, to_dict, unknown_setting
from todi_offline.data import with_recorded_template
from todi_offline.errors import ConfigError, memory_errors
from todi_offline.losses import DistillationConfig
from todi_offline.models.loading import Model, Tokenizer, load_model, load_tokenizer
from todi_offline.student import LoraSettings, add_lora
from todi_offline.training.arguments import is_distance, refuse_ignored, require_kinds, require_ranges
from todi_offline.training.first_rank import mean_over_ranks, of_first_rank
from todi_offline.training.folder import (
    Start,
    begin,
    find_start,
    held,
    how_to_go_on,
    note,
    require_steps_left,
    weights_fingerprint,
)
from todi_offline.training.log import print_rows
from todi_offline.training.recipes import recipe_settings
from todi_offline.training.selected import SelectedData, select_data
from todi_offline.training.stream import order_name
from todi_offline.training.trainer import ToDiTrainer, require_targets

logger = logging.getLogger(__name__)

CONFIG_NAME = "todi_config.json"

_STORAGE = {"codec", "shard_tokens"}
"""Settings of a cache on which no target depends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The student to train, and how to load it."""

    student: str
    """The student: a folder or hub id."""
    dtype: str = "float32"
    """Dtype of the weights; for mixed precision keep float32 and use --bf16."""
    attention: str | None = None
    """Attention of transformers (`attn_implementation`), such as `sdpa`."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of a training run."""

    out: Path
    """Folder for checkpoints and the trained student."""
    cache: tuple[str, ...]
    """A cache to train from: a folder or URL. May be repeated: a sequence that several caches hold is read once."""
    eval_cache: str | None = None
    """A cache of held-out data, evaluated before and after training, and as --set eval_strategy says."""
    staging: Path | None = None
    """Folder for copies of a remote cache's shards; by default ~/.cache/todi_offline/staging."""
    staging_gb: float = DEFAULT_LIMIT_GB
    """GB that these copies may take; three windows (24 shards) should fit."""
    mix_teachers: bool = False
    """Allow caches of different teachers together."""
    allow_unsealed: bool = False
    """Allow an unfinished cache, and use its committed shards."""
    resume: bool | None = None
    """--resume resumes the last checkpoint in `out`, even with other settings. --no-resume deletes the checkpoints and
    starts again. By default a run with the same settings resumes, and a run with other settings is refused."""
    recipe: str | None = None
    """Settings of a published experiment: `paper` (the ToDi paper's GPT-2) or `paper-lora` (its TinyLlama). Your own
    settings override it."""
    student: StudentConfig
    data: SelectedData = field(default_factory=SelectedData)
    lora: LoraSettings = field(default_factory=LoraSettings)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of `transformers.TrainingArguments`, by their own names."""


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """The results of a training run; the metrics are those of `ToDiTrainer`.

    Of a run that was resumed, `num_tokens`, `seconds` and `train_loss` cover the steps after its last checkpoint.
    """

    num_steps: int
    """Of the whole run."""
    num_tokens: int
    seconds: float
    train_loss: float
    before: dict[str, float]
    """Metrics on the held-out cache before the first step; empty without one."""
    after: dict[str, float]


def train(
    student: "str | Model | None" = None,
    cache: "str | Path | Cache | Sequence[str | Path] | None" = None,
    out: str | Path | None = None,
    *,
    eval_cache: "str | Path | Cache | None" = None,
    tokenizer: Tokenizer | None = None,
    config: TrainConfig | Path | None = None,
    callbacks: list[Any] | None = None,
    **settings: Setting,
) -> TrainSummary:
    """Distil a cached teacher into a student, and save it in `out` with its tokenizer.

    `config` is a `TrainConfig` or its TOML file. Settings passed by name override it: the fields of the config's tables
    and of `transformers.TrainingArguments` (`beta=1.0`, `max_steps=500`, `learning_rate=1e-4`, ...). A loaded student
    needs its `tokenizer`. With several caches, the student reads each sequence once. With `data`, it reads only the
    examples of that data set.

    Raises:
        TodiError: a setting, the cache or the student cannot be used, or they do not fit; see `todi_offline.errors`.
    """
    loaded = None if student is None or isinstance(student, str) else student
    opened, opened_eval = (each if isinstance(each, Cache) else None for each in (cache, eval_cache))
    named: dict[str, Any] = {
        "student": student if loaded is None else "(given)",
        "cache": cache if opened is None else opened.root,
        "eval_cache": eval_cache if opened_eval is None else opened_eval.root,
        "out": out,
    }
    settings |= {name: value for name, value in named.items() if value is not None}
    return _run(
        load_train_config(config, settings),
        None if loaded is None else (loaded, tokenizer),
        opened,
        opened_eval,
        callbacks,
    )


def load_train_config(base: TrainConfig | Path | None, settings: Mapping[str, Any]) -> TrainConfig:
    """Return the config of a run: defaults < recipe < `base` < settings. Unknown settings go into [trainer]."""
    given = {**_flat(base), **settings}
    if given.get("recipe") is not None:
        added = recipe_settings(given["recipe"], given)
        if added and isinstance(base, TrainConfig):
            raise ConfigError(
                f"recipe {given['recipe']} sets only settings that you have not set, and a TrainConfig sets all; pass "
                "the settings by name, or in a TOML file"
            )
        settings = {**added, **settings}
    ours = {name for name, _ in flat_fields(TrainConfig)}
    arguments = {name: value for name, value in settings.items() if name not in ours}
    chosen = load_config(TrainConfig, base, {name: value for name, value in settings.items() if name in ours})
    return dataclasses.replace(chosen, trainer={**chosen.trainer, **arguments})


def _flat(base: TrainConfig | Path | None) -> dict[str, Any]:
    """Return the settings of a config or a TOML file as one flat dict, including the settings in tables."""
    flat: dict[str, Any] = {}
    for name, value in as_tables(base).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def load_student(config: StudentConfig) -> tuple[Model, Tokenizer]:
    """Load a student and its tokenizer onto the CPU; the Trainer moves the student to its device."""
    tokenizer = _load_tokenizer(config)
    return _load_model(config), tokenizer


def _load_tokenizer(config: StudentConfig) -> Tokenizer:
    return load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)


def _load_model(config: StudentConfig) -> Model:
    return load_model(
        config.student,
        dtype=config.dtype,
        device="cpu",
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def training_arguments(config: TrainConfig) -> Any:
    """Return the Trainer's arguments: transformers' defaults, with a few changes for a command.

    A log is written every ten steps, progress bars need a terminal, and the CPU is used if there is no accelerator.

    Raises:
        ConfigError: this release of transformers does not know an argument, or refuses its value.
    """
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    refuse_ignored(config.trainer)
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    unknown = sorted(config.trainer.keys() - known)
    if unknown:
        names = [*known, *dict(flat_fields(TrainConfig))]
        other = "expected an option of `todi train --help`, or an argument of transformers' TrainingArguments"
        raise ConfigError(unknown_setting(unknown[0], names, otherwise=other))
    if "output_dir" in config.trainer:
        raise ConfigError(f"output_dir is {config.trainer['output_dir']!r}; name the folder of the run as out (--out)")
    require_kinds(config.trainer, TrainingArguments)
    require_ranges(config.trainer)
    values = {
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        **({"greater_is_better": False} if is_distance(config.trainer.get("metric_for_best_model")) else {}),
        **config.trainer,
        "output_dir": str(config.out),
    }
    if isinstance(values["report_to"], tuple):
        values["report_to"] = list(values["report_to"])  # transformers takes a tuple for a name
    try:
        arguments = TrainingArguments(**values)
        get_reporting_integration_callbacks(arguments.report_to)  # raises where a name is unknown
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses these training arguments: {' '.join(str(error).split())}") from error
    if arguments.save_strategy == "best" and not arguments.metric_for_best_model:
        raise ConfigError("save_strategy is 'best'; name the metric: --set metric_for_best_model=forward_kl")
    return arguments


@memory_errors(
    "lower per_device_train_batch_size (--batch-size) and raise gradient_accumulation_steps as much, or use "
    "--set gradient_checkpointing=true or bf16=true; the same command resumes from its last checkpoint"
)
def _run(
    config: TrainConfig,
    student: tuple[Model, Tokenizer | None] | None,
    cache: Cache | None,
    eval_cache: Cache | None,
    callbacks: list[Any] | None,
) -> TrainSummary:
    """Open the caches, check the folder of the run, and train; most errors appear before the student is loaded."""
    arguments = training_arguments(config)
    tokenizer = student[1] if student else _load_tokenizer(config.student)
    cache, eval_cache = _open_caches(config, cache, eval_cache, tokenizer)
    if tokenizer is not None:
        tokenizer = with_recorded_template(tokenizer, [part.recipe for part in cache.manifest.parts])
    if eval_cache is None and arguments.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy is {arguments.eval_strategy.value!r}, and there is no data to evaluate on; name a cache of "
            "held-out data (--eval-cache), or leave eval_strategy out"
        )
    parts = _parts(config, arguments, cache, eval_cache)
    find_start(config.out, parts, config.resume)
    with held(config.out):
        return _run_here(config, parts, arguments, (student and student[0], tokenizer), cache, eval_cache, callbacks)


def _run_here(
    config: TrainConfig,
    parts: dict[str, Any],
    arguments: Any,
    student: tuple[Model | None, Tokenizer | None],
    cache: Cache,
    eval_cache: Cache | None,
    callbacks: list[Any] | None,
) -> TrainSummary:
    """Load the student, evaluate, train, evaluate and save; or resume a run with the same settings."""
    model, tokenizer = student
    model = _load_model(config.student) if model is None else model
    parts["student_weights"] = of_first_rank(lambda: weights_fingerprint(model))
    start = find_start(config.out, parts, config.resume)
    if start.finished is not None:
        logger.warning("%s is finished, after %s steps", config.out, f"{start.finished['num_steps']:,}")
        return TrainSummary(**start.finished)
    set_seed(arguments.seed)  # the first weights of adapters follow from it too
    trainer = ToDiTrainer(
        model=add_lora(model, config.lora),
        args=arguments,
        train_dataset=cache,
        eval_dataset=eval_cache,
        processing_class=tokenizer,
        distillation=config.distillation,
        callbacks=callbacks,
    )
    print_rows(trainer)
    require_steps_left(start, trainer.num_planned_steps)
    trainer.accelerator.wait_for_everyone()  # every rank has read the folder before the first rank changes it
    if trainer.is_world_process_zero():
        begin(config.out, parts, start)
        (config.out / CONFIG_NAME).write_text(json.dumps(_recorded(config), indent=1, default=str) + "\n")
    summary = _train(trainer, config.out, start)
    if trainer.is_world_process_zero():
        note(config.out, summary=dataclasses.asdict(summary), planned_steps=trainer.state.max_steps)
    return summary


def _train(trainer: ToDiTrainer, out: Path, start: Start) -> TrainSummary:
    """Evaluate, train, evaluate, save."""
    before = dict(start.before or {})
    if trainer.eval_dataset is not None and start.checkpoint is None:
        before = _without_prefix(trainer.evaluate())
        if trainer.is_world_process_zero():
            note(out, before=before)
    started = perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=start.checkpoint)
    except KeyboardInterrupt:
        logger.warning("stopped at step %s; %s", f"{trainer.state.global_step:,}", how_to_go_on(out))
        raise
    seconds = perf_counter() - started
    after = _without_prefix(trainer.evaluate()) if trainer.eval_dataset is not None else {}
    if before:  # trainer.train() started a new log
        row = {f"eval_{name}": value for name, value in before.items()}
        trainer.state.log_history.insert(0, {**row, "epoch": 0.0, "step": 0})
    trainer.save_model()
    trainer.save_state()
    return TrainSummary(
        num_steps=output.global_step,
        num_tokens=trainer.num_tokens_trained,
        seconds=seconds,
        train_loss=mean_over_ranks(output.training_loss),  # each has the loss of its own targets, times all ranks
        before=before,
        after=after,
    )


def _open_caches(
    config: TrainConfig, cache: Cache | None, eval_cache: Cache | None, tokenizer: Tokenizer | None
) -> tuple[Cache, Cache | None]:
    """Open the caches that are not open yet, and refuse caches that do not fit the tokenizer or the objective."""
    staging = Staging(config.staging, config.staging_gb)

    def opened(place: str) -> Cache:
        return open_cache(open_store(place, staging), allow_unsealed=config.allow_unsealed)

    if cache is None:
        caches = [opened(place) for place in config.cache]
        cache = union(caches, mix_teachers=config.mix_teachers) if len(caches) > 1 else caches[0]
    if config.data.data is not None:
        cache = select_data(cache, config.data, tokenizer)
    if eval_cache is None and config.eval_cache is not None:
        eval_cache = opened(config.eval_cache)
    for each in (cache, eval_cache):
        if each is not None and tokenizer is not None:
            require_same_tokenizer(tokenizer_fingerprint(tokenizer), each.manifest, "the student")
            require_targets(each, config.distillation)
    return cache, eval_cache


def _parts(config: TrainConfig, arguments: Any, cache: Cache, eval_cache: Cache | None) -> dict[str, Any]:
    """Return everything that decides the outcome of a run, except for the student's weights; see `folder`.

    The content, the teacher and what is kept of it replace the path of a cache, and the sequences per step replace the
    batch settings.
    """
    settings = _recorded(config)
    for name in ("out", "cache", "eval_cache", "data", "staging", "staging_gb", "resume"):
        del settings[name]
    del settings["student"]["student"]
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        settings["trainer"].pop(name, None)
    settings["sequences_a_step"] = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    if arguments.dataloader_drop_last:  # what does not fill a batch is dropped, so the batch decides the epochs
        settings["sequences_a_batch"] = arguments.per_device_train_batch_size * arguments.world_size
    settings["cache_content"] = cache.content_keys.digest()
    settings["cache_targets"] = _targets(cache)
    settings["cache_order"] = order_name(cache)
    settings["eval_cache_content"] = None if eval_cache is None else eval_cache.content_keys.digest()
    settings["eval_cache_targets"] = None if eval_cache is None else _targets(eval_cache)
    parts: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return parts


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """Return a config as JSON values. A name stands in for a token such as `hub_token`, as transformers does."""
    settings = to_dict(config)
    trainer = settings["trainer"]
    settings["trainer"] = {
        name: f"<{name.upper()}>" if name.endswith("_token") else value for name, value in trainer.items()
    }
    return settings


def _targets(cache: Cache) -> dict[str, Any]:
    """Return what the targets of a content follow from: the teacher, and what is kept of it."""
    settings = to_dict(cache.manifest.settings)
    return {"teacher": cache.manifest.teacher, **{name: settings[name] for name in settings.keys() - _STORAGE}}


def _without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}
