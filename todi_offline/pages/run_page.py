"""Runs of `todi train` and scores of `todi evaluate` in, their parts of a page out, over each other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from todi_offline.errors import DataError
from todi_offline.pages.blocks import Block, lines, series, table, texts
from todi_offline.pages.page import Section

CURVES = {
    "loss": ("Loss", "nats"),
    "cross_entropy": ("Cross-entropy", "nats"),
    "kd": ("Distillation loss", "nats"),
    "forward_kl": ("Forward KL, lower bound", "nats"),
    "reverse_kl": ("Reverse KL, lower bound", "nats"),
    "share_a_above_half": ("Share of ids with the gate above 0.5", "share"),
    "grad_norm": ("Norm of the gradient", "norm"),
    "learning_rate": ("Learning rate", "rate"),
    "tokens_per_second": ("Speed", "tokens a second"),
    "data_wait_share": ("Share of the time spent waiting for data", "share"),
}
HELD_OUT = ("loss", "cross_entropy", "kd", "forward_kl", "reverse_kl", "share_a_above_half")
MEASURES = {
    "forward_kl": ("forward KL, lower bound", "nats"),
    "forward_kl_full": ("forward KL, estimate", "nats"),
    "reverse_kl": ("reverse KL, lower bound", "nats"),
    "cross_entropy": ("cross-entropy", "nats"),
    "top1_agreement": ("top-1 is the teacher's", "share"),
    "calibration_error": ("calibration error", "share"),
}
SAMPLES = 40
_SHOWN_TEXT = 3000


@dataclass(frozen=True, slots=True)
class Run:
    """The log of a training run."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    """What the Trainer logged, in order; numbers of held-out data begin with `eval_`."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores and texts that `todi evaluate --out` wrote."""

    name: str
    distance: Mapping[str, Any] | None
    predictions: Mapping[str, Mapping[str, Any]]
    """By prompt; from the first file of predictions."""


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or whole paths where different folders would get the same name."""
    names = {folder: folder.name or str(folder) for folder in folders}
    is_clear = len(set(names.values())) == len(names)
    return [names[folder] if is_clear else str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read the log of the run in a folder.

    Raises:
        DataError: there is none.
    """
    state = _read_json(folder / "trainer_state.json", "name the folder that `todi train --out` wrote")
    rows = state.get("log_history") if isinstance(state, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "step" in row for row in rows):
        raise DataError(f"{folder / 'trainer_state.json'} holds no log; name the folder that `todi train --out` wrote")
    return Run(name, rows)


def read_scores(folder: Path, name: str) -> Scores:
    """Read what an evaluation kept in a folder.

    Raises:
        DataError: `todi evaluate --out` did not write it.
    """
    metrics = _read_json(folder / "metrics.json", "name the folder that `todi evaluate --out` wrote")
    if not isinstance(metrics, Mapping) or not {"distance", "generation"} <= metrics.keys():
        raise DataError(f"{folder / 'metrics.json'} holds no scores; name a folder of `todi evaluate --out`")
    files = sorted(folder.glob("predictions-*.jsonl"))
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()] if files else []
    return Scores(name, metrics["distance"], {row["prompt"]: row for row in rows})


def _read_json(file: Path, remedy: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {file}: {reason}; {remedy}") from error


def run_section(runs: Sequence[Run]) -> Section:
    """Return the curves of some runs over each other, and their held-out metrics before and after."""
    charts = [_curve(name, label, unit, runs) for name, (label, unit) in CURVES.items()]
    blocks: list[Block] = [chart for chart in charts if chart["series"]]
    if any(_held_out(run) for run in runs):
        blocks = [_before_and_after(runs), *blocks]
    note = (
        "Each point is the mean over the steps since the point before. Held out: on the evaluation cache, before "
        "the first step and at the end. A lower bound counts all ids that the cache does not keep as one id."
    )
    return Section("Training", note, blocks)


def _curve(name: str, label: str, unit: str, runs: Sequence[Run]) -> Block:
    drawn = []
    for color, run in enumerate(runs):
        for prefix, words in (("", run.name), ("eval_", f"{run.name}, held out")):
            rows = [row for row in run.rows if isinstance(row.get(prefix + name), int | float)]
            if rows and (not prefix or name in HELD_OUT):
                line = series(words, [row["step"] for row in rows], [row[prefix + name] for row in rows])
                drawn.append(line | {"color": color, "is_held_out": bool(prefix)})
    return lines(label, "", ("step", unit), drawn, from_zero=name != "grad_norm")


def _held_out(run: Run) -> list[Mapping[str, Any]]:
    return [row for row in run.rows if "eval_loss" in row]


def _before_and_after(runs: Sequence[Run]) -> Block:
    held_out = {run.name: rows for run in runs if (rows := _held_out(run))}
    columns = ["held out", *(f"{name}, {when}" for name in held_out for when in ("before", "after"))]
    ends = [row for found in held_out.values() for row in (found[0], found[-1])]
    names = [name for name in HELD_OUT if any(f"eval_{name}" in row for row in ends)]
    return table(columns, [[CURVES[name][0], *(row.get(f"eval_{name}") for row in ends)] for name in names])


def score_section(scores: Sequence[Scores]) -> Section:
    """Return the distance of some students to their teacher, in all, by position and by the teacher's entropy."""
    measured = [(item.name, item.distance) for item in scores if item.distance]
    columns = ["measure", *(f"{name}, {what}" for name, _ in measured for what in ("mean", "standard error"))]
    rows = []
    for name, (label, _) in MEASURES.items():
        found = [distance["overall"]["measures"].get(name) or {} for _, distance in measured]
        if any(found):
            rows.append([label, *(value.get(key) for value in found for key in ("mean", "standard_error"))])
    axes = {"by_position": "position in the response, from 1", "by_teacher_entropy": "teacher entropy, nats"}
    charts = [
        chart
        for groups, axis in axes.items()
        for name, (label, unit) in MEASURES.items()
        if (chart := _by_group(measured, groups, axis, name, label, unit))["series"]
    ]
    note = "Means over targets; bands are two standard errors over sequences to each side."
    return Section("Distance to the teacher", note, [table(columns, rows), *charts])


def _by_group(
    measured: Sequence[tuple[str, Mapping[str, Any]]], groups: str, axis: str, name: str, label: str, unit: str
) -> Block:
    is_position = groups == "by_position"
    drawn = []
    for words, distance in measured:
        held = [group for group in distance[groups] if name in group["measures"]]
        found = [(_middle(group, is_position), group["measures"][name]) for group in held]
        if found:
            mean = np.array([value["mean"] for _, value in found])
            error = np.array([value["standard_error"] or 0.0 for _, value in found])
            drawn.append(series(words, [x for x, _ in found], mean, mean - 2 * error, mean + 2 * error))
    title = f"{label[0].upper()}{label[1:]}, by {'position' if is_position else 'entropy'}"
    return lines(title, "", (axis, unit), drawn, log_x=is_position)


def _middle(group: Mapping[str, Any], is_position: bool) -> float:
    """Return the place of a group on its axis; the last group, which has no end, reaches to twice its start."""
    low = group["low"] or 0
    high = group["high"] if group["high"] is not None else 2 * low
    return float(np.sqrt((low + 1) * high)) if is_position else (low + high) / 2


def sample_section(scores: Sequence[Scores]) -> Section:
    """Return what some students wrote in answer to the same prompts, beside the references."""
    written = [item for item in scores if item.predictions]
    prompts = list(written[0].predictions)[:SAMPLES]
    rows = []
    for prompt in prompts:
        first = written[0].predictions[prompt]
        found = [(item.name, item.predictions.get(prompt)) for item in written]
        answers = [(name, row["prediction"]) for name, row in found if row is not None]
        columns = [("reference", "\n\n".join(first.get("references", ()))), *answers]
        rows.append((prompt[:_SHOWN_TEXT], [(name, text[:_SHOWN_TEXT]) for name, text in columns]))
    note = f"{len(rows):,} of {len(written[0].predictions):,} prompts, with the response of each model."
    return Section("What they write", note, [texts(rows)])
