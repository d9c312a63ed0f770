"""The same question as `study`, of a real teacher with a real vocabulary: SmolLM2-135M-Instruct, 49,152 ids.

The student is 10 of the teacher's 30 layers. Warm, it was fine-tuned first, on other text, and is the same for all
arms; cold, it is untrained since the cut. Every arm starts from the same weights, reads the same batches once, in the
same order, and is trained on (1 - w) CE + w KD. The teacher reads the text once and all its logits are kept
(`_study_kept.py`), so that a dense arm needs no teacher beside the student. Its cache (K = 64, 8 samples, f16) is
narrowed for the arms as `todi-cache subset` does. Arms that learn from a cache read it with the project's own reader
and loss.

Measured on held-out text, at T = 1 and over the whole vocabulary, with standard errors over sequences: forward and
reverse KL, top-1 agreement with the teacher, cross-entropy, calibration error of the most likely token (15 bins; its
standard error is a bootstrap's over sequences). Bytes a target are those of the arrays that an arm reads.

    --set data=FILE       instructions that are read beside Python's documentation; its last 100 rows are held out
    --set targets=N       supervised tokens that an arm reads, 50,000
    --set seeds=N         of the five main arms, 3; the others have one
    --set arms=main,cold  of the groups main, cold, others, weights and knobs, by default all
    --set teacher=PATH    another teacher: a folder, hub id or GGUF file; its results are named after it
    --set work=FOLDER     where the teacher's words, students and rows are kept
    --set write=yes       the students of the first seed answer the held-out prompts of FILE: ROUGE-L
    --set report=only     make CSV, table and picture of the rows that there are

The same command goes on where it was stopped, and may run several times at once: each takes the next arm that no other
has. A thread each (OMP_NUM_THREADS=1) is the fastest on a busy machine. A dense arm takes up to 12 GB with glibc's
allocator and 5 GB with tcmalloc (LD_PRELOAD=libtcmalloc_minimal.so.4). Training is in bfloat16 by autocast, what is
measured in float32. It needs matplotlib and rouge-score: pip install 'todi-offline[benchmarks,evaluate]'.

Not claimed: anything of a student that is trained for longer: an arm is one short pass.
"""

import csv
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._study_arms import DENSE, DENSE_FORWARD_KL, SFT, Arm, cached, knobs, matched, weights
from benchmarks._study_distance import distance
from benchmarks._study_kept import numbered, open_kept
from benchmarks._study_losses import (
    Loss,
    bytes_per_target,
    cached_loss,
    dense_loss,
    random_draws,
    random_draws_loss,
)
from benchmarks._study_real_report import write_report
from benchmarks._study_real_world import Settings, claimed, narrowed, num_steps, prepare, train
from benchmarks._study_report import arm_of
from todi_offline.cache.format.fingerprint import hash_json
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.commands.allocator import keep_freed_memory
from todi_offline.data import DataConfig
from todi_offline.errors import ConfigError
from todi_offline.evaluation import evaluate_generation, load_prompts
from todi_offline.evaluation.generation import Prompts
from todi_offline.models.loading import load_model, load_tokenizer

RESULTS = Path(__file__).parent / "results"
NUM_DRAWS = 150
"""Ids drawn for random-sampling KD: they take the bytes of K = 16 with 8 samples."""
NEW_TOKENS = 64

MAIN = [
    SFT,
    DENSE,
    cached(16, 8, encoding="root8"),
    cached(64, encoding="root8"),
    Arm(targets="random", samples=NUM_DRAWS, kd_weight=matched(0.5)),
]
OTHERS = [
    *DENSE_FORWARD_KL,
    Arm(targets="renormalised", k=64, encoding="root8"),
    cached(8, 4, encoding="root8"),
    cached(32, 8),
    cached(16, 8, "forward_kl", kd_weight=matched(0.5), encoding="root8"),
    Arm(targets="random", samples=50, kd_weight=matched(0.5)),
]
COLD = [dataclasses.replace(arm, start="cold") for arm in MAIN[:4]]
WEIGHTS = list(weights())
KNOBS = [arm for arm in knobs() if arm.k or arm.targets != "cached"]
"""Those of the study of 4,096 ids but samples without kept ids: a capture that keeps ids cannot be narrowed to them."""
GROUPS = {"main": MAIN, "cold": COLD, "others": OTHERS, "weights": WEIGHTS, "knobs": KNOBS}


def run(
    quick: bool,
    *,
    seeds: str = "3",
    arms: str = ",".join(GROUPS),
    work: str = "",
    write: str = "",
    report: str = "",
    **options: str,
) -> dict[str, object]:
    keep_freed_memory()
    settings = _settings(quick, options)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "todi_offline" / "study-real"
    folder = Path(work or home) / hash_json(dataclasses.asdict(settings))[:12]
    folder.mkdir(parents=True, exist_ok=True)
    if write and not settings.data:
        raise ConfigError("nothing asks the students to write: name a file of instructions (--set data=FILE)")
    chosen = arms_of(1 if quick else int(seeds), arms.split(","))
    print(f"{len(chosen)} runs; rows, models and caches are kept in {folder}", flush=True)
    if not report:
        prepare(settings, folder)
        measure_arms(chosen, settings, folder)
        if write:
            write_arms([arm for arm in chosen if arm.seed == 0], settings, folder)
    name = "-".join(["study-real", *([Path(settings.teacher).stem] if settings.teacher else []), *["quick"] * quick])
    rows, written = read_rows(folder / "rows.csv"), read_rows(folder / "written.csv")
    print(write_report(chosen, rows, written, RESULTS / name, _shown(settings)))
    return {}


def arms_of(seeds: int, groups: Sequence[str] = tuple(GROUPS)) -> list[Arm]:
    """Return the arms of some groups, each once, the most informative first.

    Raises:
        ConfigError: a group is unknown.
    """
    if unknown := set(groups) - set(GROUPS):
        raise ConfigError(f"unknown group of arms {sorted(unknown)[0]!r}; expected some of {', '.join(GROUPS)}")
    more_seeds = [dataclasses.replace(arm, seed=seed) for seed in range(1, seeds) for arm in MAIN]
    chosen = (*(arm for group in groups for arm in GROUPS[group]), *(more_seeds if "main" in groups else []))
    return list(dict.fromkeys(chosen))


def _settings(quick: bool, options: dict[str, str]) -> Settings:
    types = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    chosen: dict[str, Any] = {name: types[name](value) for name, value in options.items()}
    small = {"targets": 1_000, "warm_targets": 1_000, "heldout_targets": 500} if quick else {}
    return Settings(**small | chosen)


def _shown(settings: Settings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    teacher = Path(settings.teacher).name or "SmolLM2-135M-Instruct"
    return values | {"teacher": teacher, "data": Path(settings.data).name or "none"}


def measure_arms(arms: Sequence[Arm], settings: Settings, folder: Path) -> None:
    """Measure the arms that are not yet measured and that no other process is measuring."""
    for number, arm in enumerate(arms):
        with claimed(folder / f"{name_of(arm)}.lock") as free:
            if free and not _done(arm, folder / "rows.csv"):
                print(f"{number + 1}/{len(arms)} {arm.start} {arm.label}, seed {arm.seed}", flush=True)
                row = measure(arm, settings, folder)
                _append(folder / "rows.csv", arm, row)
                print(f"  {row}", flush=True)


def measure(arm: Arm, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train a student as the arm says, keep it if it is of the first seed, and measure it."""
    student, num_targets, num_bytes = trained(arm, settings, folder)
    found = distance(student, open_cache(folder / "heldout"), open_kept(folder / "heldout"))
    return {"num_targets": num_targets, "bytes_per_target": round(num_bytes, 2), **found}


def trained(arm: Arm, settings: Settings, folder: Path) -> tuple[Any, int, float]:
    """Return a student trained as the arm says, the number of its targets and their bytes a target."""
    vocab_size = open_cache(folder / "train").manifest.vocab_size
    sequences, num_bytes, loss = prepared(arm, settings, folder)
    student = load_model(str(folder / arm.start), dtype="float32")
    train(student, sequences, loss, vocab_size, settings, arm.seed)
    if arm.seed == 0:
        student.save_pretrained(folder / "students" / name_of(arm))
    return student, sum(len(sequence.targets) for sequence in sequences), num_bytes


def prepared(arm: Arm, settings: Settings, folder: Path) -> tuple[Sequence[CachedSequence] | Cache, float, Loss]:
    """Return the sequences of an arm, their bytes a target, and the training loss."""
    teacher = open_kept(folder / "train").logits
    if arm.targets in ("none", "dense"):
        return numbered(open_cache(folder / "train")), 0.0, functools.partial(dense_loss, arm, teacher)
    if arm.targets == "random":
        drawn, num_bytes = random_draws(numbered(open_cache(folder / "train")), teacher, arm.samples, arm.seed)
        return drawn, num_bytes, functools.partial(random_draws_loss, arm)
    cache = narrowed(arm, folder)
    steps = num_steps(cache, settings)
    progress = ((step + 0.5) / steps for step in itertools.count())
    return cache, bytes_per_target(arm, cache), functools.partial(cached_loss, arm, cache, progress=progress)


def write_arms(arms: Sequence[Arm], settings: Settings, folder: Path) -> None:
    """Let students answer the held-out prompts, greedily and sampled, if they have not yet.

    A student that was not kept is trained again.
    """
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    config = DataConfig(data=settings.data, max_length=settings.max_length, max_prompt_length=settings.max_length // 2)
    questions = load_prompts(config, tokenizer)
    prompts = Prompts(questions.prompts[-settings.heldout_rows :])
    for arm in arms:
        student = folder / "students" / name_of(arm)
        with claimed(folder / f"{name_of(arm)}.lock") as free:
            if free and not _done(arm, folder / "written.csv"):
                print(f"{arm.start} {arm.label} writes", flush=True)
                if not (student / "config.json").exists():
                    trained(arm, settings, folder)
                model = load_model(str(student), dtype="float32")
                _append(folder / "written.csv", arm, written(model, tokenizer, prompts, student))


def written(model: Any, tokenizer: Any, prompts: Prompts, out: Path) -> dict[str, float]:
    """Return ROUGE-L of what a model writes, greedily and sampled once, and standard errors over prompts."""
    found: dict[str, float] = {}
    for name, greedy in (("greedy", True), ("10", False)):
        evaluate_generation(
            model, tokenizer, prompts, greedy=greedy, seeds=(10,), max_new_tokens=NEW_TOKENS, batch_size=25, out=out
        )
        lines = (out / f"predictions-{name}.jsonl").read_text().splitlines()
        scores = np.array([json.loads(line)["rouge_l"] for line in lines])
        column = "rouge_l_greedy" if greedy else "rouge_l_sampled"
        standard_error = scores.std(ddof=1) / len(scores) ** 0.5
        found |= {column: round(float(scores.mean()), 3), f"{column}_se": round(float(standard_error), 3)}
    return found


def name_of(arm: Arm) -> str:
    """Return the name of an arm's files."""
    return f"{arm.start}-{arm.label.replace(' ', '_')}-{arm.seed}"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows measured so far."""
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def _done(arm: Arm, file: Path) -> bool:
    return any(arm_of(row) == arm for row in read_rows(file))


def _append(file: Path, arm: Arm, row: dict[str, Any]) -> None:
    values = dataclasses.asdict(arm) | row
    with claimed(file.with_suffix(".lock"), waits=True), file.open("a", newline="") as opened:
        names = list(next(iter(read_rows(file)), values))  # of a file that may be older than a column
        writer = csv.DictWriter(opened, names, extrasaction="ignore", lineterminator="\n")
        if not opened.tell():
            writer.writeheader()
        writer.writerow(values)
