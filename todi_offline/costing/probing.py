"""Some of the sequences of a capture in, the teacher's targets for them and the time that they took out."""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.layout import CacheSettings, array_specs
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.capturing.engines import Engine
from todi_offline.costing.storage import as_sequences, columns_of, narrowed, stored_bytes
from todi_offline.data import Examples


@dataclass(frozen=True, slots=True)
class Probe:
    """What the teacher said of some sequences, and what that cost."""

    sequences: list[SequenceRows]
    """With targets of the widest settings."""
    asked: list[SequenceRows]
    """With targets of the settings that are asked for."""
    num_tokens: npt.NDArray[np.int64]
    """[sequence]"""
    num_targets: int
    teacher_seconds: float
    write_seconds: float
    """To encode and compress what was asked for."""
    peak_bytes: int
    """Memory that the process, or the accelerator, has used at most."""


def draw(sequences: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return some of these numbers of sequences, each as likely as another, in rising order."""
    drawn = np.random.default_rng(seed).choice(sequences, min(count, len(sequences)), replace=False)
    return np.sort(drawn)


def widest(asked: CacheSettings, shapes: Sequence[tuple[int, int]]) -> CacheSettings:
    """Return settings of which all shapes, and what is asked for, are a part."""
    k = max([asked.k, *(shape[0] for shape in shapes)])
    samples = max([asked.tail_samples, *(shape[1] for shape in shapes)])
    return with_shape(asked, k, samples)


def with_shape(asked: CacheSettings, k: int, samples: int) -> CacheSettings:
    """Return settings of another shape; samples, where there were none, are drawn at a temperature that there is."""
    at = asked.tail_temperature if asked.tail_temperature in asked.temperatures else asked.temperatures[0]
    return dataclasses.replace(asked, k=k, tail_samples=samples, tail_temperature=at)


def run_probe(engine: Engine, examples: Examples, chosen: Sequence[int], wide: CacheSettings) -> list[SequenceRows]:
    """Return the chosen examples with the teacher's targets."""
    some = [examples[int(index)] for index in chosen]
    return as_sequences(some, engine.targets(some, wide, lambda _: None))


def measure(
    engine: Engine,
    examples: Examples,
    chosen: Sequence[int],
    settings: tuple[CacheSettings, CacheSettings],
    vocab_size: int,
) -> Probe:
    """Run the teacher over the chosen examples, after one of them to warm up.

    `settings` are those that are asked for, and the widest.

    Raises:
        TodiError: what a capture of these examples would raise.
    """
    asked, wide = settings
    run_probe(engine, examples, chosen[:1], wide)
    started = perf_counter()
    sequences = run_probe(engine, examples, chosen, wide)
    teacher_seconds = perf_counter() - started
    # Samples of the whole vocabulary are stratified, and those that narrowing draws are not: they take more bytes.
    rows = narrowed(sequences, asked) if asked.k else run_probe(engine, examples, chosen, asked)
    started = perf_counter()
    _write(rows, asked, vocab_size)
    return Probe(
        sequences,
        rows,
        np.array([len(each.token_ids) for each in sequences], np.int64),
        sum(len(each.targets) for each in sequences),
        teacher_seconds,
        perf_counter() - started,
        _peak_bytes(),
    )


def _write(sequences: Sequence[SequenceRows], settings: CacheSettings, vocab_size: int) -> None:
    """Encode and compress the targets as a shard's writer does, and drop them."""
    specs = array_specs(settings, vocab_size)
    for name, values in columns_of([encode_rows(each.targets, settings.encoding) for each in sequences]).items():
        stored_bytes(specs[name], values, settings.codec)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
