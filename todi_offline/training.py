"""Stage 2: a cache and a student in, a trained student out. The teacher is nowhere near."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache, open_cache, select, union
from todi_offline.cache.store import open_store
from todi_offline.cache.store.staging import DEFAULT_LIMIT_GB, Staging
from todi_offline.config import flat_fields, load_config, read_toml, to_dict
from todi_offline.data import DataConfig, load_examples, recorded_settings, with_recorded_template
from todi_offline.errors import CacheIncompleteError, ConfigError, ModelError
from todi_offline.losses import DistillationConfig
from todi_offline.models import Model, Tokenizer, load_model, load_tokenizer
from todi_offline.recipes import recipe_settings
from todi_offline.student import LoraSettings, add_lora
from todi_offline.trainer import ToDiTrainer
from todi_offline.training_log import print_rows

CONFIG_NAME = "todi_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Which student, and how it is loaded."""

    student: str
    """A folder or hub id."""
    dtype: str = "float32"
    """Of the weights. Mixed precision is `bf16 = true` under [trainer], on weights in float32."""
    attention: str | None = None
    """Passed to transformers as `attn_implementation`."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectedData:
    """Which examples of the caches are trained on; all of them by default."""

    data: str | None = None
    """Train on exactly the examples of this data set, as `todi capture` names it; they are found by their content."""
    split: str | None = None
    """The split of it."""
    limit: int | None = None
    """Its first rows only, this many."""
    max_length: int | None = None
    """Tokens at which an example is cut; by default where the first cache's capture cut."""
    max_prompt_length: int | None = None
    """Tokens at which a prompt is cut; by default where the first cache's capture cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All that decides a training run."""

    out: Path
    """The folder of the run: checkpoints and the trained student."""
    cache: tuple[str, ...]
    """A cache to train from: a folder or URL. Of several, all sequences, those with the same content once."""
    eval_cache: str | None = None
    """A cache of held-out data, evaluated before and after, and as [trainer] says."""
    staging: Path | None = None
    """The folder for copies of a remote cache's shards, by default ~/.cache/todi_offline/staging."""
    staging_gb: float = DEFAULT_LIMIT_GB
    """How much these may take, in GB; three windows of shards should fit."""
    mix_teachers: bool = False
    """Whether caches of different teachers may be used together."""
    allow_unsealed: bool = False
    """Whether the committed part of an unfinished cache may be used."""
    resume: bool = False
    """Whether to go on from the last checkpoint in `out`."""
    recipe: str | None = None
    """Settings of an experiment, for all that is not set here: `paper` (the ToDi paper's GPT-2) or `paper-lora` (its
    TinyLlama)."""
    student: StudentConfig
    data: SelectedData = field(default_factory=SelectedData)
    lora: LoraSettings = field(default_factory=LoraSettings)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of `transformers.TrainingArguments`, by their own names."""


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training run did; the metrics are those of `ToDiTrainer`."""

    num_steps: int
    num_tokens: int
    seconds: float
    train_loss: float
    before: dict[str, float]
    """Metrics on the held-out cache before the first step; empty without one, or when resumed."""
    after: dict[str, float]


def train(
    student: str | Model,
    cache: "str | Path | Cache | Sequence[str | Path]",
    out: str | Path,
    *,
    eval_cache: "str | Path | Cache | None" = None,
    tokenizer: Tokenizer | None = None,
    config: Path | None = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> TrainSummary:
    """Distil a cached teacher into a student, and save it in `out` with its tokenizer.

    `settings` are the fields of `TrainConfig`'s tables and of `transformers.TrainingArguments`, all by their own
    names (`beta=1.0`, `max_steps=500`, `learning_rate=1e-4`, ...); they win over the TOML file `config`.
    A student that is already loaded needs its `tokenizer`. Of several caches the union is trained on, and with `data`
    exactly the examples of that data set.

    Raises:
        TodiError: a setting, the cache or the student cannot be used, or they do not fit; see `todi_offline.errors`.
    """
    named: dict[str, Any] = {"out": out, "student": student if isinstance(student, str) else "(given)"}
    named["cache"] = [cache.root] if isinstance(cache, Cache) else _places(cache)
    if eval_cache is not None:
        named["eval_cache"] = eval_cache.root if isinstance(eval_cache, Cache) else str(eval_cache)
    return run(
        load_train_config(config, {**settings, **named}),
        None if isinstance(student, str) else (student, tokenizer),
        cache if isinstance(cache, Cache) else None,
        eval_cache if isinstance(eval_cache, Cache) else None,
        callbacks,
    )


def _places(cache: "str | Path | Sequence[str | Path]") -> list[str]:
    return [str(cache)] if isinstance(cache, str | Path) else list(map(str, cache))


def train_from(path: Path | None, settings: dict[str, Any]) -> TrainSummary:
    """Train what a TOML file and settings say, the latter winning."""
    return run(load_train_config(path, settings))


def load_train_config(path: Path | None, settings: dict[str, Any]) -> TrainConfig:
    """Return the config of a run: defaults < recipe < file < settings; what is no field of it goes to [trainer]."""
    given = {**_flat_file(path), **settings}
    if given.get("recipe") is not None:
        settings = {**recipe_settings(given["recipe"], given), **settings}
    ours = {name for name, _ in flat_fields(TrainConfig)}
    arguments = {name: value for name, value in settings.items() if name not in ours}
    chosen = load_config(TrainConfig, path, {name: value for name, value in settings.items() if name in ours})
    return dataclasses.replace(chosen, trainer={**chosen.trainer, **arguments})


def _flat_file(path: Path | None) -> dict[str, Any]:
    """Return the settings of a TOML file, those of its tables among them."""
    flat: dict[str, Any] = {}
    for name, value in (read_toml(path) if path else {}).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def load_student(config: StudentConfig) -> tuple[Model, Tokenizer]:
    """Load a student onto the CPU, with its tokenizer; the Trainer places it."""
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    model = load_model(
        config.student,
        dtype=config.dtype,
        device="cpu",
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def training_arguments(config: TrainConfig) -> Any:
    """Return the Trainer's arguments: its own defaults, but for what suits a command.

    There is a log every ten steps and bars are for terminals; where there is no accelerator, the CPU need not be named.

    Raises:
        ConfigError: one is unknown to this release of transformers, or has a value that it refuses.
    """
    from transformers import TrainingArguments

    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    unknown = sorted(config.trainer.keys() - known)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is neither a setting of todi_offline nor an argument of transformers' "
            "TrainingArguments; `todi train --help` lists the former"
        )
    values = {
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        **config.trainer,
        "output_dir": str(config.out),
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses these training arguments: {error}") from error


def run(
    config: TrainConfig,
    student: tuple[Model, Tokenizer | None] | None = None,
    cache: Cache | None = None,
    eval_cache: Cache | None = None,
    callbacks: list[Any] | None = None,
) -> TrainSummary:
    """Load what is not given, evaluate, train, evaluate, save."""
    checkpoint = _last_checkpoint(config.out) if config.resume else None
    model, tokenizer = student or load_student(config.student)
    staging = Staging(config.staging, config.staging_gb)
    if cache is None:
        caches = [
            open_cache(open_store(place, staging), allow_unsealed=config.allow_unsealed) for place in config.cache
        ]
        cache = union(caches, mix_teachers=config.mix_teachers) if len(caches) > 1 else caches[0]
    if config.data.data is not None:
        cache = select_data(cache, config.data, tokenizer)
    if tokenizer is not None:
        tokenizer = with_recorded_template(tokenizer, [part.recipe for part in cache.manifest.parts])
    if eval_cache is None and config.eval_cache is not None:
        eval_cache = open_cache(open_store(config.eval_cache, staging), allow_unsealed=config.allow_unsealed)
    trainer = ToDiTrainer(
        model=add_lora(model, config.lora),
        args=training_arguments(config),
        train_dataset=cache,
        eval_dataset=eval_cache,
        processing_class=tokenizer,
        distillation=config.distillation,
        callbacks=callbacks,
    )
    print_rows(trainer)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / CONFIG_NAME).write_text(json.dumps(to_dict(config), indent=1, default=str) + "\n")
    before = trainer.evaluate() if eval_cache and not config.resume else {}
    started = perf_counter()
    output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = perf_counter() - started
    after = trainer.evaluate() if eval_cache else {}
    trainer.save_model()
    trainer.save_state()
    return TrainSummary(
        num_steps=output.global_step,
        num_tokens=trainer.num_tokens_trained,
        seconds=seconds,
        train_loss=output.training_loss,
        before=_without_prefix(before),
        after=_without_prefix(after),
    )


def select_data(cache: Cache, data: SelectedData, tokenizer: Tokenizer | None) -> Cache:
    """Return the sequences of a cache that are the examples of a data set, in its order.

    Raises:
        CacheMismatchError: the tokenizer is not the cache's.
        CacheIncompleteError: an example is not in the cache; names the first few and what captures them.
        DataError: the data set cannot be read.
    """
    if tokenizer is None:
        raise ModelError("to find a data set in a cache, the student's tokenizer is needed; pass tokenizer")
    require_same_tokenizer(tokenizer_fingerprint(tokenizer), cache.manifest, "the student")
    recipe = cache.manifest.parts[0].recipe
    lengths = {name: getattr(data, name) or recipe.get(name) for name in ("max_length", "max_prompt_length")}
    known = {name: value for name, value in lengths.items() if isinstance(value, int)}
    settings = recorded_settings(recipe) | known
    examples = load_examples(
        DataConfig(data=data.data or "", split=data.split, limit=data.limit, **settings), tokenizer
    )
    found = cache.content_keys.find(examples.content_keys())
    if missing := np.flatnonzero(found < 0).tolist():
        names = ", ".join(examples[index].id for index in missing[:3]) + (", ..." if len(missing) > 3 else "")
        reuse = "".join(f" --reuse {member.store}" for member in cache.members)
        options = {"data": data.data, "split": data.split, "limit": data.limit, **known}
        shown = (f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)
        command = f"todi capture --teacher ... {' '.join(shown)}"
        raise CacheIncompleteError(
            f"{len(missing):,} of the {len(examples):,} examples of {data.data} are not in {cache.root}: {names}; "
            f"`{command} --out {cache.members[0].store}` appends them, `{command}{reuse} --out NEW` copies the others"
        )
    return select(cache, found)


def _last_checkpoint(out: Path) -> str:
    """Return the folder of the last checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found: str | None = get_last_checkpoint(str(out)) if out.is_dir() else None
    if found is None:
        raise ConfigError(f"{out} holds no checkpoint to go on from; leave out resume (--resume) to begin")
    return found


def _without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}
