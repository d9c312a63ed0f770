"""A cache in, its page out: its contents, its size, and some of its text with the teacher's predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.manifest import Part, describe_recipe
from todi_offline.cache.reader import Cache, read_all
from todi_offline.pages.blocks import Block, bars, facts, histogram, lines, series, table
from todi_offline.pages.choosing import BUDGET_MB, Shown, shown_sequences
from todi_offline.pages.gate import entropy_bound, teacher_entries
from todi_offline.pages.page import Page, Section
from todi_offline.pages.texts import cache_texts
from todi_offline.pages.tokens import BYTES_PER_TARGET, BYTES_PER_TOKEN, ShownSequence, token_block

MEASURED_SEQUENCES = 200
"""Sequences that the charts read, spread evenly over the cache."""

TABLE_ROWS = 500

_LEAD = (
    "A teacher has read a data set once. At every supervised position (a target) the cache keeps the ids that the "
    "teacher thinks likeliest, their probabilities, and the probability of all other ids together. Students are "
    "trained from that, without the teacher."
)

Progress = Callable[[int, int], None]
Values = npt.NDArray[np.float64]


def cache_page(
    cache: Cache,
    chosen: npt.NDArray[np.int64] | None = None,
    *,
    budget_mb: float = BUDGET_MB,
    progress: Progress | None = None,
) -> Page:
    """Return the page of a cache; `chosen` are the numbers of the sequences to show, in place of a sample.

    Raises:
        CacheError: the cache cannot be read.
    """
    shown = shown_sequences(
        cache, chosen, bytes_per_token=BYTES_PER_TOKEN, bytes_per_target=BYTES_PER_TARGET[False], budget_mb=budget_mb
    )
    measured = _measure(cache, len(shown), progress)
    sequences = read_shown(cache, shown)
    if progress:
        progress(1, 1)
    temperature = 1.0 if 1.0 in cache.manifest.settings.temperatures else cache.manifest.settings.temperatures[0]
    return Page(
        f"Cache {cache.root}",
        (
            Section("What it is", _LEAD, [facts(describe_cache(cache))]),
            Section("What it holds", measured.note, _charts(cache, measured)),
            Section(
                "Text",
                f"{len(shown):,} of {len(cache):,} sequences, as many as fit into about {budget_mb:g} MB: "
                f"{_reasons(shown)}.",
                [token_block(sequences, cache_texts(cache), temperature=temperature, beta=1.0)],
            ),
            Section("Sequences", *_sequence_table(cache, shown)),
        ),
    )


def read_shown(cache: Cache, shown: Sequence[Shown]) -> list[ShownSequence]:
    """Read the sequences of a page."""
    names = cache.sequences.select(["id", "source"]).take([item.number for item in shown]).to_pylist()
    sequences = read_all(cache, [item.number for item in shown])
    return [
        ShownSequence(item.number, name["id"], name["source"], item.why, sequence, None)
        for item, name, sequence in zip(shown, names, sequences, strict=True)
    ]


def describe_cache(cache: Cache) -> list[tuple[str, str]]:
    """Return the manifest in words."""
    manifest, settings = cache.manifest, cache.manifest.settings
    num_targets, num_bytes = int(cache.num_targets.sum()), sum(cache.bytes_by_array.values())
    kept = f"the {settings.k:,} likeliest of {manifest.vocab_size:,} ids" if settings.k else "none of the likeliest ids"
    drawn = f"{settings.tail_samples} ids drawn from the others at T = {settings.tail_temperature:g}"
    samples = drawn if settings.tail_samples else "no ids drawn from the others"
    nll = float(np.average(cache.columns["teacher_nll"], weights=cache.num_targets))
    return [
        ("Place", cache.root),
        ("Teacher", ", ".join(_teacher_facts(manifest.teacher)) or "unknown"),
        *(("Data", _describe_part(part)) for part in manifest.parts),
        ("Holds", f"{len(cache):,} sequences, {int(cache.num_tokens.sum()):,} tokens, {num_targets:,} targets"),
        ("Kept for each target", f"{kept}; {samples}"),
        ("Temperatures", ", ".join(f"{temperature:g}" for temperature in settings.temperatures)),
        ("Stored as", f"{settings.encoding}, {settings.codec}; format {manifest.format_version}"),
        ("Size", f"{num_bytes:,} bytes, {num_bytes / num_targets:.1f} a target"),
        ("Teacher NLL", f"{nll:.4f} nats"),
    ]


def _teacher_facts(teacher: Mapping[str, Any]) -> list[str]:
    if "mixed" in teacher:
        return [f"{len(teacher['mixed'])} teachers"]
    parameters = teacher.get("num_parameters")
    known = (
        teacher.get("name"),
        teacher.get("model_type"),
        parameters and f"{parameters:,} parameters",
        teacher.get("dtype"),
    )
    return [str(fact) for fact in known if fact]


def _describe_part(part: Part) -> str:
    return f"{part.num_sequences:,} sequences: {describe_recipe(part.recipe)}"


@dataclass(frozen=True, slots=True)
class _Measured:
    """Numbers of the targets of some sequences."""

    note: str
    mass: Values
    """[target, k]: of the first k entries."""
    entropy: Values
    tails: Mapping[float, Values]
    """[target], by temperature."""
    nll: Values
    position: npt.NDArray[np.int64]
    """[target]: in the response."""


def _measure(cache: Cache, num_shown: int, progress: Progress | None) -> _Measured:
    numbers = np.unique(np.linspace(0, len(cache) - 1, MEASURED_SEQUENCES).round().astype(int)).tolist()
    temperatures = cache.manifest.settings.temperatures
    parts: dict[str, list[Any]] = {name: [] for name in ("mass", "entropy", "nll", "position", *map(str, temperatures))}
    for done, sequence in enumerate(read_all(cache, numbers)):
        rows = sequence.targets
        parts["mass"].append(np.exp(rows.logprobs.astype(np.float64)).cumsum(axis=1))
        parts["nll"].append(-rows.label_logprob.astype(np.float64))
        parts["position"].append(position_in_response(sequence.target_mask))
        for temperature in temperatures:
            kept, tail, _ = teacher_entries(rows, temperature)
            parts[str(temperature)].append(np.exp(tail))
            if temperature == temperatures[0]:
                parts["entropy"].append(entropy_bound(kept, tail))
        if progress:
            progress(done, len(numbers) + num_shown)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return _Measured(
        note=f"Measured on {len(joined['nll']):,} targets of {len(numbers):,} sequences, spread evenly over the cache.",
        tails={temperature: joined[str(temperature)] for temperature in temperatures},
        **{name: joined[name] for name in ("mass", "entropy", "nll", "position")},
    )


def position_in_response(target_mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count the targets of each run of supervised positions from 0: each is a response."""
    positions = np.flatnonzero(target_mask)
    index = np.arange(len(positions))
    begins = np.diff(positions, prepend=-2) != 1
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def _charts(cache: Cache, measured: _Measured) -> list[Block]:
    first = cache.manifest.settings.temperatures[0]
    total = int(cache.num_targets.sum())
    sizes = sorted(cache.bytes_by_array.items(), key=lambda item: -item[1])
    return [
        *([_coverage(measured)] if measured.mass.shape[1] else []),
        histogram(
            "Entropy of the teacher",
            f"At T = {first:g}, a lower bound: 0 where the teacher is sure.",
            ("nats", "targets"),
            measured.entropy,
        ),
        _tail_chart(measured),
        _nll_by_position(measured),
        histogram("Tokens of a sequence", "Of all sequences.", ("tokens", "sequences"), cache.num_tokens),
        histogram("Targets of a sequence", "Of all sequences.", ("targets", "sequences"), cache.num_targets),
        bars(
            "Bytes of a target, by array",
            "",
            [(name, num_bytes / total, f"{num_bytes / total:.2f}") for name, num_bytes in sizes if num_bytes],
        ),
    ]


def _coverage(measured: _Measured) -> Block:
    k = np.arange(1, measured.mass.shape[1] + 1)
    low, high = np.percentile(measured.mass, (10, 90), axis=0)
    return lines(
        "Probability of the first k ids",
        "The teacher's mean; eight targets of ten are within the band.",
        ("k", "probability"),
        [series("mean", k, measured.mass.mean(axis=0), low, high)],
        log_x=len(k) > 1,
    )


def _tail_chart(measured: _Measured) -> Block:
    shares = np.linspace(0, 100, 101)
    return lines(
        "Probability of the tail",
        "The probability of all ids that are not kept, at each temperature. Targets to the left of a point have less.",
        ("percent of targets", "probability"),
        [series(f"T = {t:g}", shares, np.percentile(tail, shares)) for t, tail in measured.tails.items()],
    )


def _nll_by_position(measured: _Measured) -> Block:
    """Draw means over positions that double, with their standard errors over targets."""
    last = int(measured.position.max())
    edges = np.unique(np.concatenate([[0], 2 ** np.arange(0, last.bit_length() + 1)]))
    group = np.searchsorted(edges, measured.position, side="right") - 1
    found = [(measured.position[group == number] + 1, measured.nll[group == number]) for number in np.unique(group)]
    x = np.array([np.exp(np.log(position).mean()) for position, _ in found])
    mean = np.array([nll.mean() for _, nll in found])
    error = np.array([nll.std() / np.sqrt(len(nll)) for _, nll in found])
    return lines(
        "Teacher NLL by position",
        "Position in the response, from 1. The band is two standard errors to each side.",
        ("position", "nats"),
        [series("teacher", x, mean, mean - 2 * error, mean + 2 * error)],
        log_x=len(x) > 1,
    )


def _reasons(shown: Sequence[Shown]) -> str:
    counts: dict[str, int] = {}
    for item in shown:
        counts[item.why] = counts.get(item.why, 0) + 1
    return ", ".join(f"{count:,} {why}" for why, count in counts.items())


def _sequence_table(cache: Cache, shown: Sequence[Shown]) -> tuple[str, list[Block]]:
    """Return a note and the table: the sequences that are shown, and others evenly spread."""
    is_shown = {item.number for item in shown}
    spread = np.unique(np.linspace(0, len(cache) - 1, TABLE_ROWS).round().astype(int)).tolist()
    numbers = sorted({*is_shown, *spread})
    columns = {
        "id": "id",
        "source": "source",
        "num_tokens": "tokens",
        "num_targets": "targets",
        "teacher_nll": "teacher NLL",
        "topk_mass": "kept mass",
    }
    found = cache.sequences.select(list(columns)).take(numbers).to_pylist()
    rows = [[number, *map(_short, row.values())] for number, row in zip(numbers, found, strict=True)]
    links = [f"#seq={number}" if number in is_shown else None for number in numbers]
    note = f"{len(numbers):,} of {len(cache):,}. Click a link for its text above; click a heading to sort."
    return note, [table(["number", *columns.values()], rows, links)]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
