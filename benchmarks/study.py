"""What does a sparse cache cost a student, in distance to its teacher, against bytes a target?

One teacher, one text, one student: every arm starts from the same weights, reads the same batches in the same order
for as many steps, and is trained on (1 - w) CE + w KD. Compared are

    SFT                   w = 0
    dense                 ToDi and forward KL with the teacher itself beside the student, as in an online run
    K = k+s, k bucket,    targets of `capture`: k ids and s tail samples, the tail as a bucket, or no tail; read back
    k no tail             through `open_cache` and `stream`, so that bytes a target are those on the disk
    top k renormalised    forward KL to the top k made to sum to one
    s random draws        random-sampling KD: ids drawn from the whole teacher distribution stand for it
    w = 0.6               forward KL as strong, near q = p, as ToDi at 0.5; the same holds for 0.391 and 0.3, and
                          for 0.778 and 0.7

Measured on held-out text, at T = 1 over the whole vocabulary: forward and reverse KL, cross-entropy, and the expected
calibration error of the most likely token (15 bins). `share recovered` is (SFT - arm) / (SFT - dense ToDi) in
forward KL, by seed, then averaged. Bytes a target are those of the arrays that the arm reads of the teacher's
predictions; for random draws, of their different ids and how often each was drawn, in pcodec.

    --quick               a teacher trained on the spot, one seed, some of the arms: 8 min 49 s on two cores
    --set grid=bars       the same teacher, three seeds, those arms with bars of the project: 21 runs
    --set grid=knobs      the same teacher, one setting of the objective at a time: 22 runs a seed
    --set grid=weights    the same teacher, the weights of the parts of KL at w = 1: 9 runs a seed
    --set grid=choice     the same teacher, all other settings one at a time: 61 runs a seed (--set seeds=1)
    (neither)             1,812 runs: for a GPU. Name a teacher with --set teacher=FOLDER, else SmolLM2-135M-Instruct
                          is fetched, and text with --set data=FILE and heldout=FILE, else Python's documentation
    --set vocab=512       another tokenizer for the teacher that is trained on the spot

With the teacher that is trained on the spot a run takes half a minute on one core, with a dense teacher a minute.
Rows are written as they are measured; the same command again goes on where it was stopped. results/ holds the CSV, the
table and the picture of each grid, named after the grid and --set teacher, data, heldout and vocab. It needs
matplotlib: pip install 'todi-offline[benchmarks]'.

Not claimed: that a result with a small teacher, one text and a few hundred steps holds for others. The measure, forward
KL, is nearer to the objective of forward KL than to ToDi.
"""

import csv
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._study_arms import Arm, arms_of
from benchmarks._study_losses import (
    Batch,
    Loss,
    bytes_per_target,
    cached_loss,
    calibration_error,
    dense_loss,
    logits_of,
    losses_of,
    on_device,
    random_draws,
    random_draws_loss,
)
from benchmarks._study_report import arm_of, write_report
from benchmarks._study_world import ON_THE_SPOT, Settings, World, batches, make_world, optimise
from todi_offline.cache.format.fingerprint import hash_json
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.commands.allocator import keep_freed_memory
from todi_offline.commands.demo import fetch_teacher
from todi_offline.models.loading import evaluation_mode
from todi_offline.training.stream import Collator

RESULTS = Path(__file__).parent / "results"
NAMED = ("teacher", "data", "heldout", "vocab")
"""The settings that the names of result files hold; the files hold all."""
MEASURES = ("bytes_per_target", "forward_kl", "reverse_kl", "cross_entropy", "calibration_error", "seconds")


def run(quick: bool, *, grid: str = "", seeds: str = "", work: str = "", **options: str) -> dict[str, object]:
    keep_freed_memory()
    grid = "quick" if quick else grid or "full"
    settings = _settings(grid, options)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "todi_offline" / "study"
    folder = Path(work or home) / hash_json(dataclasses.asdict(settings))[:12]
    folder.mkdir(parents=True, exist_ok=True)
    arms = arms_of(grid, int(seeds or (1 if quick else 3)))
    print(f"{len(arms)} runs; rows, models and caches are kept in {folder}", flush=True)
    rows = _measured(arms, make_world(settings, folder), folder)
    world = (f"{name}-{Path(options[name]).stem}" for name in NAMED if name in options)
    print(write_report(rows, RESULTS / "-".join(["study", grid, *world]), dataclasses.asdict(settings)))
    return {}


def _settings(grid: str, options: dict[str, str]) -> Settings:
    types = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    chosen: dict[str, Any] = {name: types[name](value) for name, value in options.items()}
    if grid == "full" and "teacher" not in chosen:
        chosen["teacher"] = str(fetch_teacher())
    if chosen.get("teacher", ON_THE_SPOT) != ON_THE_SPOT:
        chosen = {"steps": 1_000, "warm_steps": 1_000, "learning_rate": 5e-4} | chosen
    return Settings(**chosen)


def _measured(arms: Sequence[Arm], world: World, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each arm, of this run or of an earlier one."""
    file = folder / "rows.csv"
    columns = [*(field.name for field in dataclasses.fields(Arm)), *MEASURES]
    done: dict[Arm, dict[str, Any]] = {}
    if file.exists():
        with file.open(newline="") as opened:
            done = {arm_of(row): dict(row) for row in csv.DictReader(opened)}
    else:
        file.write_text(",".join(columns) + "\n")
    for number, arm in enumerate(arms):
        if arm not in done:
            texts = {name: str(value) for name, value in dataclasses.asdict(arm).items()}
            done[arm] = texts | measure(arm, world, folder)
            with file.open("a", newline="") as opened:
                csv.writer(opened).writerow(done[arm].values())
            found = f"forward KL {done[arm]['forward_kl']:.4f}, {done[arm]['seconds']:.0f} s"
            print(f"{number + 1}/{len(arms)} {arm.start} {arm.label}, seed {arm.seed}: {found}", flush=True)
    return [done[arm] for arm in arms]


def measure(arm: Arm, world: World, folder: Path) -> dict[str, float]:
    """Train a student as the arm says, and measure it."""
    sequences, num_bytes, loss = _prepared(arm, world, folder)
    started = perf_counter()
    student = world.student(arm.start).train()
    torch.manual_seed(arm.seed)
    drawn = batches(len(sequences), world.settings.batch_sequences, arm.seed)
    losses = losses_of(student, sequences, drawn, loss, world.teacher.vocab_size)
    optimise(student, losses, world.settings.steps, world.settings.learning_rate)
    found = _distance(student, world, folder)
    return {"bytes_per_target": round(num_bytes, 2), **found, "seconds": round(perf_counter() - started, 1)}


def _prepared(arm: Arm, world: World, folder: Path) -> tuple[Sequence[CachedSequence] | Cache, float, Loss]:
    """Return the sequences of an arm, their bytes a target, and the training loss."""
    teacher = functools.partial(_teacher_logits, world)
    if arm.targets == "random":
        sequences, num_bytes = random_draws(_captured(world, folder, "train"), teacher, arm.samples, arm.seed)
        return sequences, num_bytes, functools.partial(random_draws_loss, arm)
    k = arm.k if arm.targets == "cached" else arm.k or 8
    cache = _captured(world, folder, "train", k, arm.samples, arm.encoding, arm.drawn_at)
    if arm.targets in ("none", "dense"):
        return cache, 0.0, functools.partial(dense_loss, arm, teacher)
    progress = ((step + 0.5) / world.settings.steps for step in itertools.count())
    return cache, bytes_per_target(arm, cache), functools.partial(cached_loss, arm, cache, progress=progress)


def _teacher_logits(world: World, batch: Batch) -> Tensor:
    with evaluation_mode(world.teacher.model):
        return logits_of(world.teacher.model, on_device(batch, world.teacher.model), world.teacher.vocab_size)


def _captured(
    world: World, folder: Path, split: str, k: int = 8, samples: int = 0, encoding: str = "f16", drawn_at: float = 1.0
) -> Cache:
    """Return a cache of a split, captured once."""
    out = folder / f"{split}-{k}+{samples}-{encoding}-{drawn_at:g}"
    examples = world.train if split == "train" else world.heldout
    capture(
        world.teacher,
        examples,
        out,
        k=k,
        tail_samples=samples,
        tail_temperature=drawn_at,
        temperatures=(1.0, 2.0),
        encoding=encoding,
        shard_tokens=65_536,
    )
    return open_cache(out)


@torch.no_grad()
def _distance(student: Any, world: World, folder: Path) -> dict[str, float]:
    """Compare a student with the teacher, over the whole vocabulary and on held-out text."""
    cache, collate = _captured(world, folder, "heldout"), Collator()
    forward, reverse, ce, confidence, right = [], [], [], [], []
    for start in range(0, len(cache), 8):
        batch = on_device(collate([cache[index] for index in range(start, min(start + 8, len(cache)))]), student)
        with evaluation_mode(student):
            q = logits_of(student, batch, world.teacher.vocab_size).float().log_softmax(-1)
        p = _kept_teacher_logprobs(world, folder, start, batch)
        forward.append((p.exp() * (p - q)).sum(-1))
        reverse.append((q.exp() * (q - p)).sum(-1))
        ce.append(-q.gather(-1, batch["labels"][:, None]).squeeze(-1))
        best = q.max(-1)
        confidence.append(best.values.exp())
        right.append((best.indices == batch["labels"]).float())
    return {
        "forward_kl": round(torch.cat(forward).mean().item(), 5),
        "reverse_kl": round(torch.cat(reverse).mean().item(), 5),
        "cross_entropy": round(torch.cat(ce).mean().item(), 5),
        "calibration_error": round(calibration_error(torch.cat(confidence), torch.cat(right)), 5),
    }


def _kept_teacher_logprobs(world: World, folder: Path, start: int, batch: Batch) -> Tensor:
    """Return the teacher's log-probs at a batch of held-out text, computed once and kept in a file."""
    file = folder / f"heldout-teacher-{start}.npy"
    if not file.exists():
        np.save(file, _teacher_logits(world, batch).float().log_softmax(-1).cpu().numpy())
    return torch.from_numpy(np.load(file)).to(batch["labels"].device)
