"""The rows of the study of a real teacher in; its CSV, its table and its picture out."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._environment import environment, listed
from benchmarks._study_arms import Arm
from benchmarks._study_report import Row, arm_of, draw, summarise

MEASURES = ("forward_kl", "reverse_kl", "top1_agreement", "cross_entropy", "calibration_error")
WRITTEN = ("rouge_l_greedy", "rouge_l_sampled")
HEADER = (
    "start",
    "trained on",
    "bytes a target",
    "forward KL",
    "share of dense ToDi's gain",
    "reverse KL",
    "share",
    "top-1 agreement",
    "cross-entropy",
    "ECE",
    "ROUGE-L greedy",
    "sampled",
    "seeds",
)


def write_report(
    arms: Sequence[Arm], rows: Sequence[Row], written: Sequence[Row], path: Path, settings: dict[str, Any]
) -> str:
    """Write path.csv, path.md and path.svg of the arms that ran; return the table."""
    order = {arm: number for number, arm in enumerate(arms)}
    joined = sorted(_joined(rows, written), key=lambda row: order.get(arm_of(row), len(order)))
    missing = [arm for arm in arms if arm not in {arm_of(row) for row in joined}]
    table = "\n".join([*(_table(joined) if joined else ()), "", *_missing(missing)])
    if joined:
        with path.with_suffix(".csv").open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(joined[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(joined)
        same_seed = [row for row in joined if str(row["seed"]) == str(joined[0]["seed"])]
        draw(
            summarise(same_seed, ("bytes_per_target", *MEASURES)),
            path.with_suffix(".svg"),
            ("forward_kl", "reverse_kl"),
        )
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    trained = {row["num_targets"] for row in joined}
    notes = [
        f"Every arm read {' or '.join(sorted(trained)) or 'no'} supervised tokens, once.",
        "±: the deviation over seeds where there are several; in brackets the standard error over held-out text, of "
        "the first seed. That of the text is common to all arms: differences between arms have a smaller one. Shares "
        "are counted within a seed, then averaged; compare other numbers of arms with one seed and with several with "
        "care. The picture is of the first seed.",
    ]
    facts = f"```\n{listed(environment())}\nsettings: {chosen}\n```"
    path.with_suffix(".md").write_text("\n\n".join([f"# {path.name}", facts, *notes, table]) + "\n")
    return table


def _joined(rows: Sequence[Row], written: Sequence[Row]) -> list[Row]:
    """Return the rows with what their students wrote; empty where they did not yet."""
    scores = {arm_of(row): row for row in written}
    columns = [*WRITTEN, *(f"{name}_se" for name in WRITTEN)]
    return [row | {name: scores.get(arm_of(row), {}).get(name, "") for name in columns} for row in rows]


def _table(rows: Sequence[Row]) -> list[str]:
    first = {(row["start"], arm_of(row).label): row for row in reversed(rows)}
    means = summarise(rows, ("bytes_per_target", *MEASURES))
    for mean, other in zip(means, summarise(rows, share_of="reverse_kl"), strict=True):
        mean |= {f"reverse_{name}": other[name] for name in ("share", "share_deviation")}
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for mean in sorted(means, key=lambda mean: (mean["start"] != "warm", mean["forward_kl"])):
        cells = _cells(mean, first[mean["start"], mean["label"]])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(mean: Row, row: Row) -> list[str]:
    """Return the cells of a line: means over seeds, and of the row of the first seed the standard errors."""
    deviates = mean["seeds"] > 1

    def cell(name: str, digits: int = 4) -> str:
        deviation = f" ± {mean[f'{name}_deviation']:.{digits}f}" if deviates else ""
        return f"{mean[name]:.{digits}f}{deviation} ({float(row[f'{name}_se']):.{digits}f})"

    def share(name: str) -> str:
        if mean[name] is None:
            return ""
        return f"{mean[name]:.1%}" + (f" ± {mean[f'{name}_deviation']:.1%}" if deviates else "")

    size = f"{mean['bytes_per_target']:.1f}" if mean["bytes_per_target"] else "–"
    wrote = [f"{float(row[name]):.1f} ({float(row[f'{name}_se']):.1f})" if row[name] else "" for name in WRITTEN]
    distances = [cell("forward_kl"), share("share"), cell("reverse_kl"), share("reverse_share")]
    others = [cell(name) for name in MEASURES[2:]]
    return [mean["start"], mean["label"], size, *distances, *others, *wrote, str(mean["seeds"])]


def _missing(arms: Sequence[Arm]) -> list[str]:
    """Say which arms have not run."""
    if not arms:
        return ["All arms have run."]
    return ["Not run yet:", *(f"- {arm.start} {arm.label}, seed {arm.seed}" for arm in arms)]
