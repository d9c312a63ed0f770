"""`todi-cache subset`: a cache in, a smaller one out."""

import json
from pathlib import Path
from typing import Any

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.check.summary import size_of
from todi_offline.cache.convert.choosing import choose
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.reader import open_cache

_CONDITIONS = ("ids", "keys", "like", "expression", "limit")


@click.command()
@click.argument("cache")
@click.option("--out", required=True, help="Where the smaller cache is written: a folder or URL.")
@click.option("--ids", type=click.Path(path_type=Path), help="A file of sequence ids, one a line.")
@click.option(
    "--keys", type=click.Path(path_type=Path), help="A file of content keys, one a line: `todi keys` makes it."
)
@click.option("--like", help="Another cache: keep only sequences that it has.")
@click.option("--where", "expression", help="A condition, e.g. 'teacher_nll < 2.5 and topk_mass > 0.9'.")
@click.option("--limit", type=click.IntRange(1), help="Keep at most this many sequences, the first ones.")
@click.option("--k", type=int, help="Entries to keep at each position.")
@click.option(
    "--temperature", "temperatures", type=float, multiple=True, help="A temperature to keep. May be repeated."
)
@click.option("--tail-samples", type=int, help="Samples to keep at each position.")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="How log-probs are stored.")
@click.option("--codec", type=click.Choice(CODECS), help="How arrays are compressed.")
@click.option("--shard-tokens", type=int, help="Tokens a shard can hold.")
@click.option("--allow-unsealed", is_flag=True, help="Take the committed shards of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(cache: str, out: str, allow_unsealed: bool, as_json: bool, **options: Any) -> None:
    """Write some sequences of a cache to another, with fewer entries or in another encoding.

    A sequence must meet all conditions. Columns for --where: id, source, num_tokens, num_targets, teacher_nll,
    topk_mass.

    Example: todi-cache subset cache/ --where "teacher_nll < 2.5" --k 16 --out small/
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    chosen, recipe = choose(opened, **{name: options.pop(name) for name in _CONDITIONS})
    settings = {name: value for name, value in options.items() if value not in (None, ())}
    with progress_bar("shards") as progress:
        subset_cache(opened, out, chosen, recipe, progress, **settings)
    written = open_cache(out)
    if as_json:
        click.echo(json.dumps({"of": len(opened), **size_of(written)}, indent=1))
        return
    size = size_of(written)
    click.echo(f"{out} holds {size['sequences']:,} of {len(opened):,} sequences, {size['targets']:,} targets")
    click.echo(f"{size['bytes_per_target']:.1f} bytes a target")
    before, after = opened.manifest.settings.encoding, written.manifest.settings.encoding
    if before != after:
        click.echo(f"log-probs are rounded twice, as {before} and as {after}; all other numbers are exact")
