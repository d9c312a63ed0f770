"""Settings in; the text of the study of a real teacher, the teacher's logits on it, and the students out."""

import contextlib
import fcntl
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._study_arms import SFT, Arm
from benchmarks._study_kept import keep
from benchmarks._study_losses import Batch, Loss, dense_loss, losses_of
from benchmarks._study_world import batches, optimise
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.commands.demo import fetch_teacher
from todi_offline.data import DataConfig, Example, Examples, load_examples
from todi_offline.student import prune_depth, spaced_layers
from todi_offline.teacher.in_transformers import Teacher, TeacherConfig, load_teacher

K, SAMPLES = 64, 8
"""Of the capture that the others are narrowed from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings that decide a row beside its arm."""

    teacher: str = ""
    """A folder, hub id or GGUF file; by default SmolLM2-135M-Instruct is fetched."""
    data: str = ""
    """A file of instructions beside Python's documentation."""
    rows: int = 900
    """Read of each, at most."""
    heldout_rows: int = 100
    """Of each, apart."""
    targets: int = 50_000
    warm_targets: int = 50_000
    """That the warm student was fine-tuned on."""
    heldout_targets: int = 4_000
    layers: int = 10
    max_length: int = 256
    batch_sequences: int = 8
    learning_rate: float = 5e-4


def prepare(settings: Settings, folder: Path) -> None:
    """Make the parts that all arms share, once: the teacher's logits on train and held-out text, and the students."""
    parts: dict[str, Callable[[], None]] = {
        "train": lambda: _keep("train", settings, folder),
        "warm": lambda: _make_students(settings, folder),
        "heldout": lambda: _keep("heldout", settings, folder),
    }
    for waits in (False, True):  # another process may be at one of them: the others come first
        for name, make in parts.items():
            done = folder / f"{name}.done"
            with claimed(folder / f"{name}.lock", waits=waits) as free:
                if free and not done.exists():
                    print(f"making {name}", flush=True)
                    make()
                    done.touch()


@contextlib.contextmanager
def claimed(file: Path, *, waits: bool = False) -> Iterator[bool]:
    """Within, whether no other process has what the file stands for; a process that ends loses it."""
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@functools.cache
def _teacher(settings: Settings) -> Teacher:
    return load_teacher(TeacherConfig(teacher=settings.teacher or str(fetch_teacher()), dtype="float32"))


def _keep(split: str, settings: Settings, folder: Path) -> None:
    teacher = _teacher(settings)
    kept = Examples.from_list(texts(settings, teacher.tokenizer)[split])
    keep(teacher, kept, folder / split, k=K, tail_samples=SAMPLES, temperatures=(1.0,))


def texts(settings: Settings, tokenizer: Any) -> dict[str, list[Example]]:
    """Return the examples that warm the student, those that arms learn from and those held out: none twice."""

    def read(data: str, split: str | None = None, limit: int | None = None) -> list[Example]:
        prompt = settings.max_length // 2
        config = DataConfig(
            data=data, split=split, limit=limit, max_length=settings.max_length, max_prompt_length=prompt
        )
        return list(load_examples(config, tokenizer))

    given = read(settings.data) if settings.data else []
    last = max(len(given) - settings.heldout_rows, 0)
    train = [*given[:last][: settings.rows], *read("stdlib", "train", settings.rows)]
    heldout = [*given[last:], *read("stdlib", "heldout", settings.heldout_rows)]
    train, heldout = (_shuffled(examples) for examples in (train, heldout))
    warm = _up_to(train, settings.warm_targets)
    return {
        "warm": warm,
        "train": _up_to(train[len(warm) :], settings.targets),
        "heldout": _up_to(heldout, settings.heldout_targets),
    }


def _shuffled(examples: Sequence[Example]) -> list[Example]:
    return [examples[index] for index in np.random.default_rng(0).permutation(len(examples))]


def _up_to(examples: Sequence[Example], num_targets: int) -> list[Example]:
    """Return the first examples whose targets stay within a number."""
    totals = np.cumsum([example.target_mask.sum() for example in examples])
    return list(examples[: max(1, int(np.searchsorted(totals, num_targets, side="right")))])


def _make_students(settings: Settings, folder: Path) -> None:
    """Save the cold student and the warm one, which is the cold one fine-tuned."""
    teacher = _teacher(settings)
    teacher.tokenizer.save_pretrained(folder / "tokenizer")
    student = prune_depth(teacher.model, spaced_layers(teacher.model.config.num_hidden_layers, settings.layers))
    student.save_pretrained(folder / "cold")
    sequences = [_without_teacher(example) for example in texts(settings, teacher.tokenizer)["warm"]]
    train(student, sequences, functools.partial(dense_loss, SFT, _no_teacher), teacher.vocab_size, settings, 0)
    student.save_pretrained(folder / "warm")


def _no_teacher(_: Batch) -> Tensor:
    raise AssertionError("an arm of labels alone asks no teacher")


def _without_teacher(example: Example) -> CachedSequence:
    num_targets = int(example.target_mask.sum())
    nothing = np.zeros((num_targets, 1), np.float32)
    targets = TargetRows(nothing.astype(np.uint32), nothing, nothing, nothing[:, 0], (1.0,))
    return CachedSequence(example.token_ids, example.target_mask, targets)


def train(student: Any, sequences: Any, loss: Loss, vocab_size: int, settings: Settings, seed: int) -> None:
    """Train a student for one pass over the sequences."""
    steps = num_steps(sequences, settings)
    size = min(settings.batch_sequences, len(sequences))
    drawn = itertools.islice(batches(len(sequences), size, seed), steps)
    torch.manual_seed(seed)
    losses = losses_of(student.train(), sequences, drawn, loss, vocab_size, torch.bfloat16)
    optimise(student, _told(losses, steps), steps, settings.learning_rate)


def num_steps(sequences: Any, settings: Settings) -> int:
    """Return the number of whole batches in one pass over the sequences, at least one."""
    return max(1, len(sequences) // settings.batch_sequences)


def _told(losses: Iterator[Tensor], steps: int) -> Iterator[Tensor]:
    for step, loss in enumerate(losses):
        if step % 10 == 0:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
        yield loss


def narrowed(arm: Arm, folder: Path) -> Cache:
    """Return the cache that an arm reads, narrowed once from the capture."""
    whole, name = open_cache(folder / "train"), f"train-{arm.k}+{arm.samples}-{arm.encoding}"
    with claimed(folder / f"{name}.lock", waits=True):
        kept: dict[str, Any] = {"k": arm.k, "tail_samples": arm.samples, "encoding": arm.encoding}
        subset_cache(whole, str(folder / name), np.ones(len(whole), bool), {}, **kept)
    return open_cache(folder / name)
