"""`todi-cache inspect`: a cache in, what it holds and what that costs out."""

import json
from collections.abc import Iterator
from typing import Any

import click

from todi_offline.cache.check.summary import summarise_cache
from todi_offline.cache.format.manifest import describe_recipe
from todi_offline.cache.reader import open_cache


@click.command()
@click.argument("cache")
@click.option("--rows", type=click.IntRange(0), default=0, metavar="N", help="Show N targets, always the same ones.")
@click.option("--text", is_flag=True, help="Show ids as text, too.")
@click.option("--allow-unsealed", is_flag=True, help="Look at the committed part of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(cache: str, rows: int, text: bool, allow_unsealed: bool, as_json: bool) -> None:
    """Show the manifest, the arrays, the bytes a target by array, and the mass that the first k entries cover.

    Example: todi-cache inspect cache/ --rows 5 --text
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    found = summarise_cache(opened, rows, with_text=text)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    manifest, settings = found["manifest"], found["manifest"]["settings"]
    teacher = manifest["teacher"]
    size = f"{teacher['num_parameters']:,} parameters" if "num_parameters" in teacher else None
    known = (teacher.get("model_type"), teacher.get("name"), size, teacher.get("dtype"))
    yield "teacher      " + ", ".join(str(fact) for fact in known if fact is not None)
    for part in manifest["parts"]:
        recipe = describe_recipe(part["recipe"])
        yield f"data         {part['num_sequences']:,} sequences: {recipe}"
    yield f"vocabulary   {manifest['vocab_size']:,}"
    yield f"kept         k = {settings['k']}, {settings['tail_samples']} tail samples, T = {settings['temperatures']}"
    yield f"stored as    {settings['encoding']}, {settings['codec']}; format {manifest['format_version']}"
    yield f"holds        {found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['targets']:,} targets"
    yield f"size         {found['bytes']:,} bytes, {found['bytes_per_target']:.1f} a target"
    yield f"teacher NLL  {found['teacher_nll']:.4f} nats"
    yield ""
    yield f"{'array':16}{'dtype':>8}{'shape':>16}{'chunk':>12}  {'codec':12}{'bytes a target':>15}"
    for name, array in found["arrays"].items():
        shape, chunk = (" x ".join(map(str, array[size])) for size in ("shape", "chunk"))
        described = f"{name:16}{array['dtype']:>8}{shape:>16}{chunk:>12}  {array['codec']:12}"
        yield f"{described}{array['bytes_per_target']:>15.2f}"
    yield ""
    yield "mass of the first k   " + "   ".join(f"{k}: {mass:.3f}" for k, mass in found["coverage"].items())
    for row in found["rows"]:
        yield ""
        tails = ", ".join(f"{value:.3f} at T = {t}" for t, value in row["tail_logsumexp"].items())
        yield f"{row['sequence']}, position {row['position']}: kept mass {row['kept_mass']:.4f}; log tail {tails}"
        yield f"    label {_shown(row['label'])}"
        yield "    top   " + "  ".join(map(_shown, row["top"]))


def _print(lines: Iterator[str]) -> None:
    """Print lines, coloured on a terminal."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, markup=False, emoji=False, soft_wrap=True)


def _shown(entry: dict[str, Any]) -> str:
    text = f" {entry['text']!r}" if "text" in entry else ""
    return f"{entry['id']}{text} {entry['p']:.4f}"
