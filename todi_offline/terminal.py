"""Summaries in, tables on the terminal out; and the progress of long work."""

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click


def no_bars_in_logs() -> None:
    """Keep the bars of other libraries to terminals; called before those are imported, which is when tqdm looks."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def progress(unit: str, *, quiet: bool) -> Iterator[Any]:
    """Yield a callback of (done, total, note): a bar on a terminal, a line for every tenth elsewhere.

    Both show the rate since the first call, and the time that is left at this rate.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, rate = bar.add_task(unit), _Rate()

            def show(done: int, total: int, note: str = "") -> None:
                words = ", ".join(filter(None, (note, rate.words(unit, done, total))))
                bar.update(task, completed=done, total=total, description=f"{unit}{words and ', '}{words}")

            yield show
    else:
        tenth, rate = -1, _Rate()

        def line(done: int, total: int, note: str = "") -> None:
            nonlocal tenth
            words = rate.words(unit, done, total)
            if 10 * done // total != tenth:
                tenth = 10 * done // total
                said = (f"{done:,} of {total:,} {unit}", note, words)
                click.echo(", ".join(filter(None, said)), err=True)

        yield line


class _Rate:
    """How fast work goes since the first call."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None

    def words(self, unit: str, done: int, total: int) -> str:
        """Return the rate and the time left, once there is something to go by."""
        now = time.monotonic()
        since, first = self._begun = self._begun or (now, done)
        if done <= first or now <= since:
            return ""
        rate = (done - first) / (now - since)
        left = datetime.timedelta(seconds=round((total - done) / rate))
        return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s" + (f", {left} left" if total > done else "")


def cache_rows(summary: Any) -> list[tuple[str, str]]:
    """Return what any summary of a capture shows of its cache."""
    return [
        ("bytes a target", f"{summary.bytes_per_target:.1f}"),
        ("mass of the kept ids", f"{summary.mean_topk_mass:.3f}"),
    ]


def print_capture(summary: Any) -> None:
    """Print what a capture did, and what its cache holds."""
    report = {name.removeprefix("num_"): n for name, n in dataclasses.asdict(summary.data_report).items() if n}
    click.echo("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in report.items()))
    print_table(
        "Cache",
        [
            ("sequences", f"{summary.num_sequences:,}"),
            ("targets", f"{summary.num_targets:,}"),
            ("tokens captured now", f"{summary.num_captured_tokens:,} of {summary.num_tokens:,}"),
            ("targets captured now", f"{summary.num_captured_targets:,}"),
            ("targets reused now", f"{summary.num_reused_targets:,}"),
            ("sequences already there", f"{summary.num_known_sequences:,}"),
            *cache_rows(summary),
        ],
    )
    if len(summary.workers) > 1:
        rows = [
            (name, f"{work.num_shards:,}", f"{work.num_captured_tokens:,}", f"{work.teacher_seconds:,.0f}")
            for name, work in sorted(summary.workers.items())
        ]
        print_table("Workers", rows, ("", "shards", "tokens", "seconds"), min_width=8)


_DISTANCES = {
    "forward_kl": "forward KL, lower bound",
    "forward_kl_full": "forward KL, estimate",
    "reverse_kl": "reverse KL, lower bound",
    "cross_entropy": "cross-entropy",
    "teacher_cross_entropy": "cross-entropy of the teacher",
    "perplexity": "perplexity",
    "top1_agreement": "top-1 is the teacher's",
    "top1_accuracy": "top-1 is the label",
    "confidence": "confidence",
    "calibration_error": "calibration error",
    "calibration_error_to_teacher": "calibration error to the teacher",
}
_DISTANCES_OF_GROUPS = {
    "forward_kl": "fwd KL",
    "forward_kl_full": "estimate",
    "reverse_kl": "rev KL",
    "cross_entropy": "CE",
    "top1_agreement": "top-1",
    "calibration_error": "calib.",
}


def print_distance(distance: Any) -> None:
    """Print a student's distance to a cached teacher, in all and by groups."""
    overall = distance.overall
    rows: list[tuple[str, ...]] = [("targets", f"{overall.num_targets:,}", "")]
    for name, label in _DISTANCES.items():
        if found := overall.measures.get(name):
            error = found.standard_error
            rows.append((label, f"{found.mean:z.4f}", "" if error is None else f"{error:.4f}"))
    title = f"Distance to the teacher, k = {distance.k}, T = {distance.temperature:g}, nats"
    print_table(title, rows, (f"{distance.num_sequences:,} sequences", "mean", "standard error"))
    _print_groups("position", distance.by_position, is_whole=True)
    _print_groups("teacher entropy", distance.by_teacher_entropy, is_whole=False)


def _print_groups(title: str, groups: Sequence[Any], *, is_whole: bool) -> None:
    shown = {name: label for name, label in _DISTANCES_OF_GROUPS.items() if name in groups[0].measures}
    rows = [
        (
            _range(group.low or 0, group.high, is_whole),
            f"{group.num_targets:,}",
            *(f"{group.measures[name].mean:z.3f}" for name in shown),
        )
        for group in groups
    ]
    print_table("", rows, (title, "targets", *shown.values()), min_width=7)


def _range(low: float, high: float | None, is_whole: bool) -> str:
    """Name the numbers from `low` to below `high`."""
    if high is None:
        return f"{low:g} and more"
    if is_whole:
        return f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
    return f"{low:g} to {high:g}"


def print_generation(generation: Any) -> None:
    """Print the scores of a student's responses."""
    deviation = generation.rouge_l_deviation
    rows: list[tuple[str, ...]] = [
        ("ROUGE-L", f"{generation.rouge_l:.2f}"),
        *([] if deviation is None else [("deviation over seeds", f"{deviation:.2f}")]),
        *((f"  {run}", f"{score:.2f}") for run, score in generation.rouge_l_by_run.items()),
        ("tokens of a response", f"{generation.mean_new_tokens:.1f}"),
        ("responses ended", f"{generation.share_ended:.1%}"),
        ("prompts cut", f"{generation.num_prompts_cut:,}"),
        ("rows dropped", f"{generation.num_dropped:,}"),
    ]
    print_table(f"Responses to {generation.num_prompts:,} prompts", rows)


def print_table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = (), min_width: int = 14) -> None:
    """Print rows, the first column on the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False)
    for column in range(len(rows[0])):
        table.add_column(header[column] if header else "", justify="right" if column else "left", min_width=min_width)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_texts(texts: Mapping[str, str], num_letters: int = 400) -> None:
    """Print the beginnings of texts, each below its name."""
    for name, text in texts.items():
        click.echo(f"\n{name}")
        for line in text[:num_letters].splitlines():
            click.echo(f"    {line}")
    click.echo("")


def print_json(summary: Any) -> None:
    """Print a summary as JSON."""
    click.echo(json.dumps(dataclasses.asdict(summary), indent=1))
