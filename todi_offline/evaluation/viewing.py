"""A student with a cache, training runs or scores come in; one page that shows them goes out."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from todi_offline.cache.reader import Cache, open_cache
from todi_offline.config import Setting, load_config
from todi_offline.errors import ConfigError
from todi_offline.evaluation.reading import read_sequences
from todi_offline.models.loading import load_model, load_tokenizer
from todi_offline.pages.cache_page import read_shown
from todi_offline.pages.choosing import BUDGET_MB, shown_sequences
from todi_offline.pages.page import Page, Section
from todi_offline.pages.run_page import (
    Scores,
    names_of,
    read_run,
    read_scores,
    run_section,
    sample_section,
    score_section,
)
from todi_offline.pages.texts import cache_texts
from todi_offline.pages.token_page import token_section
from todi_offline.pages.tokens import BYTES_PER_TARGET, BYTES_PER_TOKEN

Progress = Callable[[int, int], None]

RUN_CONFIG = "todi_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """What a page shows, and how."""

    out: Path
    """The HTML file to write."""
    student: str | None = None
    """A student whose predictions are shown at every token: a folder, hub id or GGUF file."""
    cache: str | None = None
    """The cache whose text the student reads, such as a held-out one."""
    run: tuple[Path, ...] = ()
    """A folder of `todi train --out`, for its curves. May be repeated: the curves share one chart."""
    scores: tuple[Path, ...] = ()
    """A folder of `todi evaluate --out`, for its distances and texts. May be repeated: they are shown side by side."""
    budget: float = BUDGET_MB
    """MB that the text may take in the file."""
    temperature: float | None = None
    """Temperature of both models; by default the run's own, else 1."""
    beta: float | None = None
    """Sharpness of ToDi's gate; by default the run's own, else 1."""
    device: str = "auto"
    """Device of the student: auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Dtype of the weights; `auto` keeps the dtype of the files."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    allow_unsealed: bool = False
    """Allow an unfinished cache, and use its committed shards."""

    def __post_init__(self) -> None:
        """Refuse settings with nothing to show, a student without a cache, and a cache without a student.

        Raises:
            ConfigError: an option is missing; the message names it.
        """
        if (self.student is None) != (self.cache is None):
            missing = "--cache" if self.cache is None else "--student"
            raise ConfigError(f"{missing} is missing: a student needs a cache to read, and a cache needs a student")
        if not (self.student or self.run or self.scores):
            raise ConfigError("nothing to show; name a student and a cache (--student, --cache), --run or --scores")


def view(
    config: ViewConfig | Path | None = None,
    *,
    answers: Sequence[Scores] = (),
    progress: Progress | None = None,
    **settings: Setting,
) -> Page:
    """Write a page and return its contents. `answers` adds texts that are not in a folder of `todi evaluate --out`.

    `config` is a `ViewConfig` or its TOML file; settings passed by name override it.

    Raises:
        TodiError: the student, the cache, a run or scores cannot be read, or the page cannot be written.
    """
    config = load_config(ViewConfig, config, settings)
    runs = list(map(read_run, config.run, names_of(config.run)))
    scores = [*answers, *map(read_scores, config.scores, names_of(config.scores))]
    sections: list[Section] = []
    if config.student is not None and config.cache is not None:
        cache = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
        sections.append(_read(config, config.student, cache, progress))
    if any(item.predictions for item in scores):
        sections.append(sample_section(scores))
    if any(item.distance for item in scores):
        sections.append(score_section(scores))
    if runs:
        sections.append(run_section(runs))
    names = [config.student] if config.student else [run.name for run in runs] + [item.name for item in scores]
    page = Page(f"Student {', '.join(dict.fromkeys(names))}", sections)
    page.write(config.out)
    return page


def _read(config: ViewConfig, student: str, cache: Cache, progress: Progress | None) -> Section:
    """Return the section of the student's predictions, for as many sequences as the page has room for."""
    own = run_settings(Path(student))
    temperature = config.temperature if config.temperature is not None else own.get("temperature", 1.0)
    beta = config.beta if config.beta is not None else own.get("beta", 1.0)
    tokenizer = load_tokenizer(student, trust_remote_code=config.trust_remote_code)
    model = load_model(student, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    shown = shown_sequences(
        cache, None, bytes_per_token=BYTES_PER_TOKEN, bytes_per_target=BYTES_PER_TARGET[True], budget_mb=config.budget
    )
    sequences = read_shown(cache, shown)
    predictions = read_sequences(model, tokenizer, cache, [item.sequence for item in sequences], temperature)
    predicted = []
    for item, rows in zip(sequences, predictions, strict=True):
        predicted.append(dataclasses.replace(item, student=rows))
        if progress:
            progress(len(predicted), len(sequences))
    return token_section(
        predicted,
        cache_texts(cache),
        names={"Student": student, "Cache": cache.root},
        num_sequences=len(cache),
        temperature=temperature,
        beta=beta,
    )


def run_settings(folder: Path) -> dict[str, float]:
    """Return beta and temperature of the run in a folder; an empty dict if the folder has no run."""
    file = folder / RUN_CONFIG
    if not file.is_file():
        return {}
    distillation = json.loads(file.read_text(encoding="utf-8")).get("distillation", {})
    return {name: float(distillation[name]) for name in ("beta", "temperature") if name in distillation}
