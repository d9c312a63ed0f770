"""Command lines in, calls of the library out: the commands of `todi`.

A command's options are the fields of its config, with the field's own documentation as their help.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from todi_offline import __version__
from todi_offline.commands.allocator import keep_freed_memory
from todi_offline.commands.headings import HEADINGS
from todi_offline.commands.options import ConfigCommand, argument, config_options, given, whole_numbers
from todi_offline.commands.terminal import (
    cache_rows,
    no_bars_in_logs,
    print_capture,
    print_distance,
    print_generation,
    print_json,
    print_plan,
    print_student,
    print_table,
    print_texts,
    progress,
)
from todi_offline.config import load_config
from todi_offline.errors import one_line_errors


@click.group(context_settings={"max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Distil language models from an offline cache of sparse teacher logits.

    \b
    todi demo                                           see it work, on a real teacher
    todi plan --teacher T --data D --probe 64           what stage 1 will cost, before it runs
    todi capture --teacher T --data D --out CACHE       stage 1: run the teacher once
    todi student --from T --layers 8 --out S            cut a student from the teacher, or make a new one of its family
    todi train --student S --cache CACHE --out RUN      stage 2: train, without the teacher
    todi evaluate --student S --cache HELDOUT           measure its distance to the teacher, without the teacher
    todi view --student S --cache HELDOUT --out F       a page: ToDi's gate at every token, curves, texts
    todi-cache inspect CACHE                            look into a cache; todi-cache view makes a page of it
    """
    no_bars_in_logs()
    keep_freed_memory()


@cli.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("todi-demo"),
    show_default=True,
    help="Folder for all that the demo writes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo(out: Path, as_json: bool) -> None:
    """Distil a student from a real teacher over real text, in some minutes.

    \b
    Example: todi demo --out todi-demo
    """
    from todi_offline.commands.demo import demo
    from todi_offline.pages.texts import printable

    with progress("tokens", quiet=as_json) as report, contextlib.redirect_stdout(sys.stderr):
        summary = demo(out, stage=lambda text: click.echo(f"> {text}", err=True), progress=_shown(report))
    if as_json:
        print_json(summary)
        return
    print_table("Cache", [("targets", f"{summary.num_targets:,}"), *cache_rows(summary)])
    print_table("Seconds", [(name, f"{seconds:.0f}") for name, seconds in summary.seconds.items()])
    rows = [
        (name.replace("_kl", " KL to the teacher").replace("_", "-"), f"{value:.3f}", f"{summary.after[name]:.3f}")
        for name, value in summary.before.items()
    ]
    print_table("Student on held-out text, nats", rows, ("", "before", "after"))
    print_texts({name: printable(text) for name, text in summary.answers[0].items()})
    click.echo(f"{out} has cache/, heldout-cache/, student/, run/ and summary.json")
    click.echo(f"open {out / 'index.html'} in a browser: it shows ToDi's gate at every token of the held-out text")


@cli.command(
    cls=ConfigCommand,
    config="todi_offline.capturing.config:CaptureConfig",
    groups=HEADINGS["capture"],
)
@config_options("Print the summary as JSON.")
def capture(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Run a teacher once over a data set, and keep its sparse targets.

    The same command resumes a capture that was stopped.

    \b
    Example: todi capture --teacher teacher/ --data dolly.jsonl --out cache/ --k 32
    """
    from todi_offline.capturing import capture
    from todi_offline.capturing.ranks import one_rank_speaks

    with contextlib.ExitStack() as stack:
        speaks = stack.enter_context(one_rank_speaks())
        report = stack.enter_context(progress("tokens", quiet=as_json or not speaks))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # where the messages of Ray belong
        summary = capture(config=config, progress=_shown(report), **given(settings))
    if speaks:
        (print_json if as_json else print_capture)(summary)


@cli.command(
    cls=ConfigCommand,
    config=("todi_offline.costing:PlanOptions", "todi_offline.capturing.config:CaptureConfig"),
    groups=HEADINGS["plan"],
)
@click.option("--out", help="An existing cache to add to: its sequences are not counted. By default a new cache.")
@config_options("Print the plan as JSON.", file="A TOML file of a capture's settings.")
def plan(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Say what a capture will cost, before it runs.

    The plan has time, memory, files, bytes by shape, and the cost of training a student. It takes the options of `todi
    capture`, and refuses what a capture would refuse.

    \b
    Example: todi plan --teacher teacher/ --data dolly.jsonl --probe 64 --student student/
    """
    from todi_offline.costing import plan

    stage = (lambda _: None) if as_json else (lambda text: click.echo(f"> {text}", err=True))
    (print_json if as_json else print_plan)(plan(config=config, stage=stage, **given(settings)))


def _shown(report: Any) -> Any:
    """Return what shows the progress of a capture."""
    return report and (
        lambda at: report(at.num_tokens, at.total_tokens, f"{at.num_shards:,} of {at.total_shards:,} shards")
    )


@cli.command(cls=ConfigCommand, config="todi_offline.student:MakingConfig", groups=HEADINGS["student"])
@click.option("--from", "source", help="The teacher: a folder, a hub id, or a GGUF file. [required]")
@click.option("--keep", help="The layers to keep, such as 0,4,8,29.")
@config_options("Print what the student is made of as JSON.")
def student(config: Path | None, keep: str | None, as_json: bool, **settings: Any) -> None:
    """Make a student: cut it from a teacher, or make a new model of the same family.

    Name the sizes of the student to cut depth, width or both. With --fresh its weights are random.

    \b
    Example: todi student --from teacher/ --layers 8 --out student/
    Example: todi student --from teacher/ --hidden 384 --heads 6 --mlp 1024 --importance-data dolly.jsonl --out student/
    Example: todi student --from teacher/ --fresh --hidden 384 --layers 6 --out student/
    """
    from todi_offline.student import make_student

    kept: dict[str, Any] = {} if keep is None else {"keep": whole_numbers("keep", keep)}
    made = make_student(config=config, **kept, **given(settings))
    (print_json if as_json else print_student)(made)


@cli.command(
    cls=ConfigCommand,
    config="todi_offline.training.run:TrainConfig",
    groups=HEADINGS["train"],
)
@click.option("--epochs", "num_train_epochs", type=float, help="Passes over the cache. [default: 3]")
@click.option("--max-steps", type=int, help="Optimizer steps, in place of --epochs.")
@click.option("--learning-rate", type=float, help="The peak learning rate. [default: 5e-5]")
@click.option(
    "--batch-size", "per_device_train_batch_size", type=int, help="Sequences in a batch on each device. [default: 8]"
)
@click.option(
    "--gradient-accumulation",
    "gradient_accumulation_steps",
    type=int,
    help="Batches whose gradients are added up for one optimizer step. [default: 1]",
)
@click.option("--bf16/--no-bf16", default=None, help="Train in bfloat16 mixed precision.")
@click.option("--warmup-steps", type=int, help="Steps over which the learning rate rises to its peak.")
@click.option("--seed", type=int, help="Seed of the order of the data and of dropout. [default: 42]")
@click.option("--logging-steps", type=int, help="Steps from one line of the log to the next. [default: 10]")
@click.option("--save-steps", type=int, help="Steps from one checkpoint to the next. [default: 500]")
@click.option("--report-to", help="Where curves are sent: tensorboard, trackio, wandb, ... [default: none]")
@click.option(
    "--set",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other field of transformers' TrainingArguments, such as --set weight_decay=0.01.",
)
@config_options("Print the summary as JSON.")
def train(config: Path | None, arguments: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Train a student from a cache. The teacher is not needed.

    \b
    Example: todi train --student student/ --cache cache/ --out run/ --epochs 3 --learning-rate 1e-4
    """
    from todi_offline.training.first_rank import is_first_rank
    from todi_offline.training.run import train

    overrides = {**dict(map(argument, arguments)), **given(settings)}
    with contextlib.redirect_stdout(sys.stderr):  # where transformers' log belongs
        summary = train(config=config, **overrides)
    if not is_first_rank():
        return
    if as_json:
        print_json(summary)
        return
    rate = f"{summary.num_tokens / summary.seconds:,.0f}"
    rows = [
        ("steps", f"{summary.num_steps:,}"),
        ("tokens a second", rate),
        ("loss", f"{summary.train_loss:.4f}"),
    ]
    print_table("Run", rows)
    shown = ("cross_entropy", "kd", "forward_kl", "reverse_kl")
    if summary.before and summary.after:
        compared = [(name, f"{summary.before[name]:.4f}", f"{summary.after[name]:.4f}") for name in shown]
        print_table("Held-out, nats", compared, ("", "before", "after"))


@cli.command(
    cls=ConfigCommand,
    config="todi_offline.evaluation:EvaluateConfig",
    groups=HEADINGS["evaluate"],
)
@config_options("Print the summary as JSON.")
def evaluate(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Measure a student's distance to a cached teacher, and its ROUGE-L.

    A held-out cache gives the distance, a data set with references gives ROUGE-L. Name either or both.

    \b
    Example: todi evaluate --student run/ --cache heldout/ --data dolly-dev.jsonl --out scores/
    """
    from todi_offline.evaluation import evaluate

    with progress("texts", quiet=as_json) as report:
        summary = evaluate(config=config, progress=report, **given(settings))
    if as_json:
        print_json(summary)
        return
    if summary.distance:
        print_distance(summary.distance)
    if summary.generation:
        print_generation(summary.generation)


@cli.command(
    cls=ConfigCommand,
    config="todi_offline.evaluation.viewing:ViewConfig",
    groups=HEADINGS["view"],
)
@config_options("Print the numbers of the page as JSON.")
def view(config: Path | None, as_json: bool, **settings: Any) -> None:
    """Write a page of a student: its predictions, training and responses.

    The predictions are shown beside the teacher's, token by token. The page is one file that opens in a browser by
    double click, without a server or the network.

    \b
    Example: todi view --student run/ --cache heldout/ --run run/ --scores scores/ --out run.html
    """
    from todi_offline.evaluation.viewing import view

    with progress("sequences", quiet=as_json) as report:
        page = view(config, progress=report, **given(settings))
    if as_json:
        click.echo(json.dumps(page.to_json(), indent=1))
        return
    click.echo("the page shows: " + ", ".join(section.title for section in page.sections))


@cli.command(
    cls=ConfigCommand,
    config="todi_offline.data:DataConfig",
    groups=HEADINGS["keys"],
)
@click.option("--tokenizer", required=True, help="The tokenizer: a folder, a hub id, or a GGUF file.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The text file to write, with one key in each line."
)
def keys(tokenizer: str, out: Path, **settings: Any) -> None:
    """Write the content keys of a data set, by which `todi-cache subset --keys` selects its sequences in a cache.

    \b
    Example: todi keys --data some.jsonl --tokenizer teacher/ --out keys.txt
    """
    from todi_offline.data import DataConfig, load_examples
    from todi_offline.models.loading import load_tokenizer

    examples = load_examples(load_config(DataConfig, overrides=given(settings)), load_tokenizer(tokenizer))
    content_keys = examples.content_keys()
    out.write_text("".join(f"{key}\n" for key in content_keys.to_hex()), encoding="utf-8")
    click.echo(f"{out} has the keys of {len(content_keys):,} examples")


def main() -> None:
    """Run `todi`; an error of ours is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with one_line_errors():
        cli()
