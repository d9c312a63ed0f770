"""`todi-cache verify`: a cache in, its problems out."""

import dataclasses
import json
import sys

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache


@click.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
def command(cache: str, as_json: bool) -> None:
    """Check every checksum and every invariant; list all problems, and exit with 1 if there is damage.

    Example: todi-cache verify cache/
    """
    with progress_bar("shards") as progress:
        problems = verify_cache(cache, progress)
    is_damaged = any(not problem.is_note for problem in problems)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(problem) for problem in problems], indent=1))
    for problem in [] if as_json else problems:
        kind = "note: " if problem.is_note else ""
        click.echo(f"{kind}{problem.where}: {problem.what}\n    {problem.remedy.text}")
    if is_damaged:
        sys.exit(1)
    if not as_json:
        opened = open_cache(cache)
        click.echo(f"{cache} is whole: {len(opened):,} sequences, {int(opened.num_targets.sum()):,} targets")
