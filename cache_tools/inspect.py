"""`todi-cache inspect`: a cache in, its contents and its size out."""

import json
from collections.abc import Iterator
from typing import Any

import click

from todi_offline.cache.check.summary import TextOf, summarise_cache
from todi_offline.cache.format.manifest import describe_recipe
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.errors import CacheError
from todi_offline.pages.texts import cache_texts

ROWS = 3
LEFT_OUT = 10  # examples that are named; --json has all


@click.command()
@click.argument("cache")
@click.option(
    "--rows",
    type=click.IntRange(0),
    default=ROWS,
    show_default=True,
    metavar="N",
    help="Show N targets, always the same ones; 0 for none.",
)
@click.option("--allow-unsealed", is_flag=True, help="Show the committed shards of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(cache: str, rows: int, allow_unsealed: bool, as_json: bool) -> None:
    """Show the manifest, the arrays and their bytes a target, the mass of the first k entries, and some targets.

    Targets show text if the cache holds the teacher's tokenizer, and ids if not.

    Example: todi-cache inspect cache/
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    found = summarise_cache(opened, rows, _text_of(opened) if rows else None)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(_lines(found))


def _text_of(cache: Cache) -> TextOf | None:
    """Return the function from ids to text, or None if the cache holds no tokenizer.

    Raises:
        CacheError: the tokenizer cannot be read; names the option that does without.
    """
    try:
        texts = cache_texts(cache)
    except CacheError as error:
        raise CacheError(f"{error}; `todi-cache inspect --rows 0` shows the rest") from error
    if texts.tokenizer is None:
        return None
    return lambda ids: texts.of_id(ids[0]) if len(ids) == 1 else "".join(piece.text for piece in texts.pieces(ids))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    manifest, settings = found["manifest"], found["manifest"]["settings"]
    teacher = manifest["teacher"]
    size = f"{teacher['num_parameters']:,} parameters" if "num_parameters" in teacher else None
    known = (teacher.get("model_type"), teacher.get("name"), size, teacher.get("dtype"))
    yield "teacher      " + ", ".join(str(fact) for fact in known if fact is not None)
    for part in manifest["parts"]:
        recipe = describe_recipe(part["recipe"])
        yield f"data         {part['num_sequences']:,} sequences: {recipe}"
        for example, reason in list(part["recipe"].get("left_out", {}).items())[:LEFT_OUT]:
            yield f"left out     {example}: {reason}"
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
    if found["coverage"]:
        yield "mass of the first k   " + "   ".join(f"{k}: {mass:.3f}" for k, mass in found["coverage"].items())
    for row in found["rows"]:
        yield ""
        yield f"{row['sequence']}, position {row['position']}, after {_text(row['before'])}"
        yield f"    label  {_shown(row['label'])}"
        for name, entries in (("top", row["top"]), ("drawn", row["drawn"])):
            if entries:
                yield f"    {name:5}  " + "  ".join(map(_shown, entries))
        tails = ", ".join(f"{value:.3f} at T = {t}" for t, value in row["tail_logsumexp"].items())
        yield f"    kept mass {row['kept_mass']:.4f}; log tail {tails}"


def _print(lines: Iterator[str]) -> None:
    """Print lines, coloured on a terminal."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, markup=False, emoji=False, soft_wrap=True)


def _shown(entry: dict[str, Any]) -> str:
    return f"{entry['id']} {repr(entry['text']) + ' ' if 'text' in entry else ''}{entry['p']:.4f}"


def _text(before: dict[str, Any]) -> str:
    return repr(before["text"]) if "text" in before else " ".join(map(str, before["ids"]))
