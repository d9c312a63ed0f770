"""`todi-cache verify`: a cache in, everything that is wrong with it out."""

import dataclasses
import json
import sys

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.records import read_seal
from todi_offline.cache.store import open_store


@click.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
def command(cache: str, as_json: bool) -> None:
    """Check every checksum and every invariant; exit with 1 and the list of what is wrong.

    Example: todi-cache verify cache/
    """
    with progress_bar("shards") as progress:
        problems = verify_cache(cache, progress)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(problem) for problem in problems], indent=1))
    for problem in [] if as_json else problems:
        click.echo(f"{problem.where}: {problem.what}\n    to mend it: {problem.remedy.text}")
    if problems:
        sys.exit(1)
    if not as_json:
        seal = read_seal(open_store(cache))
        click.echo(f"{cache} is whole: {seal.num_sequences:,} sequences, {seal.num_targets:,} targets")
