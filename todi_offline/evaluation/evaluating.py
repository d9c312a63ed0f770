"""A student comes in, with a held-out cache or instructions; its distance to the teacher and its ROUGE-L go out."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from todi_offline.cache.reader import Cache, open_cache
from todi_offline.config import Setting, load_config, to_dict
from todi_offline.data import DataConfig
from todi_offline.errors import ConfigError, ModelError
from todi_offline.evaluation.distance import Distance, evaluate_cache
from todi_offline.evaluation.generation import (
    SEEDS,
    Generation,
    Prompts,
    evaluate_generation,
    load_prompts,
    rouge_l_scorer,
)
from todi_offline.models.loading import Model, Tokenizer, load_model, load_tokenizer

Progress = Callable[[int, int], None]

METRICS_NAME = "metrics.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """All settings of an evaluation."""

    student: str
    """The student: a folder, a hub id, a GGUF file, or a folder of LoRA adapters."""
    cache: str | None = None
    """A held-out cache, to measure the distance to its teacher."""
    data: str | None = None
    """A data set with responses, to measure ROUGE-L of the student's own responses."""
    split: str | None = None
    """The split to read; by default `train`, or the only split."""
    limit: int | None = None
    """Use only this many sequences of the cache and rows of the data, the first ones."""
    out: Path | None = None
    """Folder for `metrics.json` and the predictions of each seed; by default nothing is kept."""
    batch_size: int = 8
    """Sequences in a batch."""
    device: str = "auto"
    """Device of the student: auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Dtype of the weights; `auto` keeps the dtype of the files."""
    attention: str | None = None
    """Attention of transformers (`attn_implementation`), such as `sdpa`."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    allow_unsealed: bool = False
    """Allow an unfinished cache, and use its committed shards."""
    temperature: float = 1.0
    """Temperature of both models; the cache must have been captured at it."""
    k: int | None = None
    """Most probable ids to use at each position; by default all that the cache holds."""
    greedy: bool = False
    """Take the most probable token each time, instead of sampling with each seed."""
    seeds: tuple[int, ...] = SEEDS
    """Seed of a run of sampling. May be repeated."""
    max_new_tokens: int = 256
    """Stop a response after this many tokens."""
    max_prompt_length: int = 256
    """Cut a prompt to this many tokens; it loses its oldest turns or its middle."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"json": True})
    """Arguments of the chat template, as JSON: {"enable_thinking": false}."""
    no_repeat_ngram_size: int = 0
    """Forbid n-grams of this size to occur twice, the prompt included; 0 allows all. The paper's code has 6."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and settings with nothing to evaluate on.

        Raises:
            ConfigError: a setting is wrong; the message names it.
        """
        if self.cache is None and self.data is None:
            raise ConfigError("nothing to evaluate on; name a held-out cache (--cache), a data set (--data) or both")
        for name in ("batch_size", "max_new_tokens", "max_prompt_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; expected 1 or more, or none for all")
        if self.no_repeat_ngram_size < 0:
            raise ConfigError(f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; expected 0 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}; expected one or more, each once")


@dataclass(frozen=True, slots=True)
class EvaluateSummary:
    """The results of an evaluation; None for a measurement that was not requested."""

    distance: Distance | None
    generation: Generation | None


def evaluate(
    student: str | Model | None = None,
    *,
    cache: "str | Path | Cache | None" = None,
    data: str | None = None,
    tokenizer: Tokenizer | None = None,
    config: EvaluateConfig | Path | None = None,
    progress: Progress | None = None,
    **settings: Setting,
) -> EvaluateSummary:
    """Measure a student's distance to the teacher of a held-out cache, its ROUGE-L on instructions, or both.

    `config` is an `EvaluateConfig` or its TOML file; settings passed by name override it. A loaded student needs its
    `tokenizer`, and stays on its device.

    Raises:
        TodiError: a setting, the student, the cache or the data cannot be used, or do not fit together.
    """
    loaded = None if student is None or isinstance(student, str) else student
    opened = cache if isinstance(cache, Cache) else None
    named: dict[str, Any] = {
        "student": student if loaded is None else "(given)",
        "cache": cache if opened is None else opened.root,
        "data": data,
    }
    settings |= {name: value for name, value in named.items() if value is not None}
    return _evaluate(
        load_config(EvaluateConfig, config, settings),
        None if loaded is None else (loaded, tokenizer),
        opened,
        progress,
    )


def _evaluate(
    config: EvaluateConfig,
    student: tuple[Model, Tokenizer | None] | None,
    cache: Cache | None,
    progress: Progress | None,
) -> EvaluateSummary:
    """Load what is not loaded yet, measure, and write the results to `config.out`."""
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise ConfigError(f"{config.out} is a file; name a folder for the results (--out)")
    if cache is None and config.cache is not None:
        cache = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
    model, tokenizer = student or _load(config)
    if tokenizer is None:
        raise ModelError("a student that is already loaded needs its tokenizer: pass tokenizer=...")
    questions = _questions(config, tokenizer)  # wrong data fails here, before the cache is read
    summary = EvaluateSummary(
        distance=None if cache is None else _distance(config, model, tokenizer, cache, progress),
        generation=None if questions is None else _generation(config, model, tokenizer, questions, progress),
    )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        metrics = {"config": to_dict(config), **dataclasses.asdict(summary)}
        (config.out / METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return summary


def _load(config: EvaluateConfig) -> tuple[Model, Tokenizer]:
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    model = load_model(
        config.student,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def _questions(config: EvaluateConfig, tokenizer: Tokenizer) -> Prompts | None:
    if config.data is None:
        return None
    rouge_l_scorer()  # a missing rouge-score fails here too
    data = DataConfig(
        data=config.data,
        split=config.split,
        limit=config.limit,
        max_length=config.max_prompt_length + 1,
        max_prompt_length=config.max_prompt_length,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    return load_prompts(data, tokenizer)


def _distance(
    config: EvaluateConfig, model: Model, tokenizer: Tokenizer, cache: Cache, progress: Progress | None
) -> Distance:
    return evaluate_cache(
        model,
        tokenizer,
        cache,
        temperature=config.temperature,
        k=config.k,
        batch_size=config.batch_size,
        limit=config.limit,
        progress=progress,
    )


def _generation(
    config: EvaluateConfig, model: Model, tokenizer: Tokenizer, questions: Prompts, progress: Progress | None
) -> Generation:
    return evaluate_generation(
        model,
        tokenizer,
        questions,
        seeds=config.seeds,
        greedy=config.greedy,
        max_new_tokens=config.max_new_tokens,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        batch_size=config.batch_size,
        out=config.out,
        progress=progress,
    )
