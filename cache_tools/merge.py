"""`todi-cache merge`: caches in, one cache of all their sequences out."""

import dataclasses
import json

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.merge import merge_caches


@click.command()
@click.argument("caches", nargs=-1, required=True)
@click.option("--out", required=True, help="Where the merged cache is written: a folder or URL.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(caches: tuple[str, ...], out: str, as_json: bool) -> None:
    """Write one cache with all sequences of several caches; of sequences with the same content, keep the first.

    The caches must have the same teacher and settings. Complete shards are hard-linked if the file system can.

    Example: todi-cache merge a/ b/ --out both/
    """
    with progress_bar("shards") as progress:
        summary = merge_caches(caches, out, progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=1))
        return
    click.echo(f"{out} holds {summary.num_sequences:,} sequences, {summary.num_targets:,} targets")
    click.echo(f"shards: {summary.num_shards_linked} linked, {summary.num_shards_rewritten} written anew")
    click.echo(f"left out: {summary.num_duplicates:,} sequences with the content of an earlier one")
