"""Command lines in, calls of the library out: `todi demo`, `capture`, `student`, `train`, `evaluate`.

A command's options are the fields of its config, with the field's own documentation as their help.
"""

import ast
import contextlib
import dataclasses
import inspect
import json
import logging
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from todi_offline import __version__
from todi_offline.config import flat_fields
from todi_offline.errors import ConfigError, one_line_errors

# Options that are named otherwise than their fields: a repeated one is singular, and two of the Trainer's are short.
_OPTION_NAMES = {
    "temperatures": "temperature",
    "seeds": "seed",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch-size",
}


class ConfigCommand(click.Command):
    """A command with an option for every field of a config class, which is imported only when it is used."""

    def __init__(self, *args: Any, config: str, **kwargs: Any) -> None:
        """Name the class as `module:Class`."""
        super().__init__(*args, **kwargs)
        self._config = config
        self._options: list[click.Parameter] = []

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options of the config's fields, then the command's own."""
        if not self._options:
            module, _, name = self._config.partition(":")
            self._options = [
                option
                for field, holder in flat_fields(getattr(import_module(module), name))
                if (option := _option(field, holder)) is not None
            ]
        return [*self._options, *super().get_params(ctx)]


@click.group(context_settings={"max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Distil language models from an offline cache of sparse teacher logits.

    \b
    todi demo                                           see it work, on a real teacher
    todi capture --teacher T --data D --out CACHE       stage 1: run the teacher once
    todi student --from T --layers 8 --out S            cut a student from it
    todi train --student S --cache CACHE --out RUN      stage 2: train, without the teacher
    todi evaluate --student S --cache HELDOUT           its distance to the teacher, without the teacher
    todi-cache inspect CACHE                            look into a cache
    """


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("todi-demo"), show_default=True, help="Folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(out: Path, as_json: bool) -> None:
    """Capture a real teacher over real text and distil a student from it, in some minutes.

    Example: todi demo --out todi-demo
    """
    from todi_offline.demo import demo

    _no_bars_in_logs()
    with _progress("tokens", quiet=as_json) as progress, contextlib.redirect_stdout(sys.stderr):
        summary = demo(out, stage=lambda text: click.echo(f"> {text}", err=True), progress=progress)
    if as_json:
        _print_json(summary)
        return
    _print_table("Cache", [("targets", f"{summary.num_targets:,}"), *_cache_rows(summary)])
    _print_table("Seconds", [(name, f"{seconds:.0f}") for name, seconds in summary.seconds.items()])
    rows = [(name, f"{value:.3f}", f"{summary.after[name]:.3f}") for name, value in summary.before.items()]
    _print_table("Student on held-out text, nats", rows, ("", "before", "after"))
    click.echo(f"{out} holds cache/, heldout-cache/, student/, run/ and summary.json")


@cli.command(cls=ConfigCommand, config="todi_offline.capturing:CaptureConfig")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of these settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def capture(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Run a teacher once over a data set, and keep its sparse targets. The same command again goes on.

    Example: todi capture --teacher teacher/ --data dolly.jsonl --out cache/ --k 32
    """
    from todi_offline.capturing import capture_from

    _no_bars_in_logs()
    with _progress("tokens", quiet=as_json) as progress:
        summary = capture_from(config, _given(settings), progress)
    if as_json:
        _print_json(summary)
        return
    report = {name.removeprefix("num_"): n for name, n in dataclasses.asdict(summary.data_report).items() if n}
    click.echo("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in report.items()))
    _print_table(
        "Cache",
        [
            ("sequences", f"{summary.num_sequences:,}"),
            ("targets", f"{summary.num_targets:,}"),
            ("tokens captured now", f"{summary.num_captured_tokens:,} of {summary.num_tokens:,}"),
            ("targets captured now", f"{summary.num_captured_targets:,}"),
            ("targets reused now", f"{summary.num_reused_targets:,}"),
            ("sequences already there", f"{summary.num_known_sequences:,}"),
            *_cache_rows(summary),
        ],
    )


@cli.command()
@click.option("--from", "source", required=True, help="The teacher: a folder, hub id or GGUF file.")
@click.option("--layers", type=int, help="How many of its layers to keep, evenly spaced.")
@click.option("--keep", default="", help="Or which, e.g. 0,4,8,29.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the student.")
def student(source: str, layers: int | None, keep: str, out: Path) -> None:
    """Cut a student from a teacher by depth.

    Example: todi student --from teacher/ --layers 8 --out student/
    """
    from todi_offline.student import make_student

    _no_bars_in_logs()
    try:
        numbers = [int(number) for number in keep.split(",") if number.strip()]
    except ValueError as error:
        raise ConfigError(f"--keep is {keep!r}; expected numbers of layers, e.g. 0,4,8,29") from error
    kept = make_student(source, out, layers=layers, keep=numbers)
    click.echo(f"{out} has the layers {', '.join(map(str, kept))} of {source}, and its tokenizer")


@cli.command(cls=ConfigCommand, config="todi_offline.training:TrainConfig")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--epochs", "num_train_epochs", type=float, help="Passes over the cache.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--batch-size", "per_device_train_batch_size", type=int, help="Sequences of a batch on a device.")
@click.option("--set", "arguments", multiple=True, metavar="NAME=VALUE", help="Any of transformers' TrainingArguments.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of these settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(config: Path | None, arguments: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Train a student from a cache. The teacher is not needed.

    Example: todi train --student student/ --cache cache/ --out run/ --epochs 3 --learning-rate 1e-4 --set bf16=true
    """
    from todi_offline.training import train_from

    _no_bars_in_logs()
    overrides = {**dict(map(_argument, arguments)), **_given(settings)}
    with contextlib.redirect_stdout(sys.stderr):  # where transformers' log belongs
        summary = train_from(config, overrides)
    if as_json:
        _print_json(summary)
        return
    rate = f"{summary.num_tokens / summary.seconds:,.0f}"
    rows = [
        ("steps", f"{summary.num_steps:,}"),
        ("tokens a second", rate),
        ("loss", f"{summary.train_loss:.4f}"),
    ]
    _print_table("Run", rows)
    shown = ("cross_entropy", "kd", "forward_kl", "reverse_kl")
    if summary.before and summary.after:
        compared = [(name, f"{summary.before[name]:.4f}", f"{summary.after[name]:.4f}") for name in shown]
        _print_table("Held-out, nats", compared, ("", "before", "after"))


@cli.command(cls=ConfigCommand, config="todi_offline.evaluation:EvaluateConfig")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of these settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def evaluate(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Measure a student's distance to the teacher of a held-out cache, its ROUGE-L on instructions, or both.

    Example: todi evaluate --student run/ --cache heldout/ --data dolly-dev.jsonl --out scores/
    """
    from todi_offline.evaluation import evaluate_from

    _no_bars_in_logs()
    with _progress("texts", quiet=as_json) as progress:
        summary = evaluate_from(config, _given(settings), progress)
    if as_json:
        _print_json(summary)
        return
    if summary.distance:
        _print_distance(summary.distance)
    if summary.generation:
        _print_generation(summary.generation)


def main() -> None:
    """Run `todi`; an error of ours is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with one_line_errors():
        cli()


def _option(field: str, holder: type) -> click.Option | None:
    """Return the option of a config's field, or None for a table that has no single value."""
    item = next(item for item in dataclasses.fields(holder) if item.name == field)
    kind = typing.get_type_hints(holder)[field]
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(arg for arg in args if arg is not type(None))
        args = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return None
    name = _OPTION_NAMES.get(field, field).replace("_", "-")
    described = _help(field, holder, item)
    if kind is bool:
        return click.Option([f"--{name}/--no-{name}", field], default=None, help=described)
    multiple = typing.get_origin(kind) is tuple
    choice = click.Choice(args) if typing.get_origin(kind) is typing.Literal else None
    scalar = args[0] if multiple else click.Path(path_type=Path) if kind is Path else kind
    return click.Option([f"--{name}", field], type=choice or scalar, multiple=multiple, default=None, help=described)


def _help(field: str, holder: type, item: "dataclasses.Field[Any]") -> str:
    text = _field_docs(holder).get(field, "")
    required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    if required:
        return f"{text} [required]"
    default = item.default
    if default in (None, False, (), dataclasses.MISSING):
        return text
    shown = ", ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else default
    return f"{text} [default: {shown}]"


def _field_docs(holder: type) -> dict[str, str]:
    """Return the string that stands below each field of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(holder))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


def _no_bars_in_logs() -> None:
    """Keep the bars of transformers to terminals."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options that stand on the command line."""
    return {name: value for name, value in settings.items() if value is not None and value != ()}


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}; expected NAME=VALUE, e.g. --set bf16=true")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a bare word


@contextlib.contextmanager
def _progress(unit: str, *, quiet: bool) -> Iterator[Any]:
    """Yield a callback of (done, total): a bar on a terminal, a line for every tenth elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(unit)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        tenth = -1

        def line(done: int, total: int) -> None:
            nonlocal tenth
            if 10 * done // total != tenth:
                tenth = 10 * done // total
                click.echo(f"{done:,} of {total:,} {unit}", err=True)

        yield line


def _cache_rows(summary: Any) -> list[tuple[str, str]]:
    return [
        ("bytes a target", f"{summary.bytes_per_target:.1f}"),
        ("mass of the kept ids", f"{summary.mean_topk_mass:.3f}"),
    ]


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


def _print_distance(distance: Any) -> None:
    overall = distance.overall
    rows: list[tuple[str, ...]] = [("targets", f"{overall.num_targets:,}", "")]
    for name, label in _DISTANCES.items():
        if found := overall.measures.get(name):
            error = found.standard_error
            rows.append((label, f"{found.mean:z.4f}", "" if error is None else f"{error:.4f}"))
    title = f"Distance to the teacher, k = {distance.k}, T = {distance.temperature:g}, nats"
    _print_table(title, rows, (f"{distance.num_sequences:,} sequences", "mean", "standard error"))
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
    _print_table("", rows, (title, "targets", *shown.values()), min_width=7)


def _range(low: float, high: float | None, is_whole: bool) -> str:
    """Name the numbers from `low` to below `high`."""
    if high is None:
        return f"{low:g} and more"
    if is_whole:
        return f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
    return f"{low:g} to {high:g}"


def _print_generation(generation: Any) -> None:
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
    _print_table(f"Responses to {generation.num_prompts:,} prompts", rows)


def _print_table(
    title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = (), min_width: int = 14
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False)
    for column in range(len(rows[0])):
        table.add_column(header[column] if header else "", justify="right" if column else "left", min_width=min_width)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_json(summary: Any) -> None:
    click.echo(json.dumps(dataclasses.asdict(summary), indent=1))
