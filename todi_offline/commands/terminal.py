"""Summaries in, tables on the terminal out; progress bars for long work."""

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
    """Disable the bars of other libraries outside terminals; called before they are imported, when tqdm looks."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def progress(unit: str, *, quiet: bool) -> Iterator[Any]:
    """Yield a callback of (done, total, note): a bar on a terminal, elsewhere a line for each tenth.

    Both show the rate since the first call, and the time left at this rate.
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
    """The rate of work since the first call."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None

    def words(self, unit: str, done: int, total: int) -> str:
        """Return the rate and the time left in words, or nothing at the first call."""
        now = time.monotonic()
        since, first = self._begun = self._begun or (now, done)
        if done <= first or now <= since:
            return ""
        rate = (done - first) / (now - since)
        left = datetime.timedelta(seconds=round((total - done) / rate))
        return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s" + (f", {left} left" if total > done else "")


def cache_rows(summary: Any) -> list[tuple[str, str]]:
    """Return the rows about the cache that every summary of a capture shows."""
    return [
        ("bytes a target", f"{summary.bytes_per_target:.1f}"),
        ("mass of the kept ids", f"{summary.mean_topk_mass:.3f}"),
    ]


def print_capture(summary: Any) -> None:
    """Print the work of a capture, and the contents of its cache."""
    _print_report(summary.data_report)
    print_table(
        "Cache",
        [
            ("sequences", f"{summary.num_sequences:,}"),
            ("targets", f"{summary.num_targets:,}"),
            ("tokens captured now", f"{summary.num_captured_tokens:,} of {summary.num_tokens:,}"),
            ("targets captured now", f"{summary.num_captured_targets:,}"),
            ("targets reused now", f"{summary.num_reused_targets:,}"),
            ("sequences already there", f"{summary.num_known_sequences:,}"),
            *([("examples left out", f"{len(summary.left_out):,}")] if summary.left_out else []),
            *cache_rows(summary),
        ],
    )
    if len(summary.workers) > 1:
        rows = [
            (name, f"{work.num_shards:,}", f"{work.num_captured_tokens:,}", f"{work.teacher_seconds:,.0f}")
            for name, work in sorted(summary.workers.items())
        ]
        print_table("Workers", rows, ("", "shards", "tokens", "seconds"), min_width=8)


def _print_report(report: Any) -> None:
    """Print what became of the rows of a data set."""
    counts = {name.removeprefix("num_"): n for name, n in dataclasses.asdict(report).items() if n}
    click.echo("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))


def print_plan(plan: Any) -> None:
    """Print what a capture will cost: data, work, the table of shapes, files, a student."""
    amount = plan.amount
    _print_report(plan.report)
    rows = [
        ("sequences", f"{amount.num_sequences:,}"),
        ("tokens", f"{amount.num_tokens:,}"),
        ("targets", f"{amount.num_targets:,}"),
    ]
    if plan.num_known_sequences or plan.num_read_sequences < amount.num_sequences:
        rows += [
            ("sequences already there", f"{plan.num_known_sequences:,}"),
            ("sequences left to read", f"{plan.num_read_sequences:,}"),
        ]
    rows += [
        ("parameters of the teacher", f"{plan.teacher.num_parameters:,}"),
        ("weights of the teacher in memory", size(plan.weight_bytes)),
        *([] if plan.peak_bytes is None else [("memory of the probe, at most", size(plan.peak_bytes))]),
        ("rows of two full shards", f"2 x {size(plan.shard_memory_bytes)}"),
        ("work", f"{'at most ' if plan.teacher.has_experts else ''}{scaled(plan.flops, 'FLOP')}"),
    ]
    print_table("Capture", rows)
    if plan.num_read_sequences:
        _print_duration(plan.duration, "--probe 64 measures it, --rate TOKENS_A_SECOND computes it")
    else:
        click.echo("the teacher has nothing to read")
    of_each = "" if plan.shard_bytes is None else f", about {size(plan.shard_bytes)} each"
    click.echo(f"files: {plan.num_files:,}; shards: {amount.num_shards:,}{of_each}\n")
    if plan.choices:
        _print_choices(plan)
    if plan.student is not None:
        _print_student(plan.student)


def _print_duration(duration: Any, remedy: str) -> None:
    if duration is None:
        click.echo(f"time: unknown; {remedy}")
    else:
        click.echo(f"time: {datetime.timedelta(seconds=round(duration.seconds))} ({duration.basis})")


_SHARES = {
    "fwd": "forward_kl",
    "rev": "reverse_kl",
    "warm": "small_warm",
    "cold": "small_cold",
}


def _print_choices(plan: Any) -> None:
    """Print the table of shapes and encodings, what is asked for and what is suggested marked."""
    rows = []
    for choice in plan.choices:
        shares = [getattr(choice.shares, name) for name in _SHARES.values()]
        rows.append(
            (
                f"{choice.k}+{choice.tail_samples}",
                choice.encoding,
                "" if choice.bytes_per_target is None else f"{choice.bytes_per_target:.1f}",
                "" if choice.total_bytes is None else size(choice.total_bytes),
                "" if choice.kept_mass is None else f"{choice.kept_mass:.3f}",
                *("" if share is None else f"{share:.0%}" for share in shares),
                "suggested" if choice.is_suggested else "your settings" if choice.is_asked else "",
            )
        )
    header = ("shape", "encoding", "bytes", "total", "kept", *_SHARES, "")
    print_table("Choices", rows, header, min_width=4)
    source = "as measured with SmolLM2-135M on Dolly; --probe 64 measures your teacher on your data"
    click.echo(
        "shape: k + tail samples\n"
        f"bytes: for each target, {source if plan.peak_bytes is None else 'as measured'}\n"
        "kept: mean probability of the k ids together\n"
        "fwd, rev: share of dense ToDi's gain in forward and reverse KL, in a study of SmolLM2-135M at T = 1\n"
        "warm, cold: share in forward KL, in a study of a small teacher; the student was fine-tuned first (warm) or not"
    )
    click.echo(f"suggested: {plan.suggestion}")


def _print_student(student: Any) -> None:
    rows = [
        ("parameters", f"{student.num_parameters:,}"),
        ("steps", f"{student.num_steps:,}"),
        ("work", scaled(student.flops, "FLOP")),
        ("memory without activations", size(student.memory_bytes)),
    ]
    print_table("Student, AdamW in float32", rows)
    _print_duration(student.duration, "--probe 64 measures it, --rate TOKENS_A_SECOND computes it")


def print_student(made: Any) -> None:
    """Print what a student is made of."""
    layers = ", ".join(map(str, made.layers))
    new = "new layers, of the kinds of " if made.fresh else ""
    click.echo(f"{new}layers {layers} of the teacher")
    rows = [(name, f"{size:,}", f"{made.teacher_sizes[name]:,}") for name, size in made.sizes.items()]
    rows.append(("parameters", f"{made.num_parameters:,}", f"{made.teacher_parameters:,}"))
    print_table("", rows, ("", "student", "teacher"))


def size(num_bytes: float) -> str:
    """Return a number of bytes for people."""
    return scaled(num_bytes, "B")


def scaled(value: float, unit: str) -> str:
    """Return a value with three digits and a decimal prefix: 1,234,000 B is 1.23 MB."""
    for prefix, least in {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}.items():
        if value >= least:
            return f"{value / least:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


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
    """Print a student's distance to a cached teacher, overall and by groups."""
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
    """Return the range from `low` to below `high` in words."""
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
    """Print rows; the first column is aligned left, the others right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False)
    for column in range(len(rows[0])):
        table.add_column(header[column] if header else "", justify="right" if column else "left", min_width=min_width)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_texts(texts: Mapping[str, str], num_letters: int = 400) -> None:
    """Print the beginning of each text below its name."""
    for name, text in texts.items():
        click.echo(f"\n{name}")
        for line in text[:num_letters].splitlines():
            click.echo(f"    {line}")
    click.echo("")


def print_json(summary: Any) -> None:
    """Print a summary as JSON."""
    click.echo(json.dumps(dataclasses.asdict(summary), indent=1))
