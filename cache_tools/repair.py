"""`todi-cache repair`: a damaged cache in, the cache without its damaged shards out."""

import dataclasses
import json
import sys
from collections.abc import Iterator

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.check.repair import Repair, repair_cache
from todi_offline.cache.planning import describe_part

_PAST = ("gave up", "deleted", "wrote")


@click.command()
@click.argument("cache")
@click.option("--abandon", is_flag=True, help="Give up an unfinished capture that adds to the cache.")
@click.option("--dry-run", is_flag=True, help="Show the work, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the work as JSON.")
def command(cache: str, abandon: bool, dry_run: bool, as_json: bool) -> None:
    """Delete the damaged shards of a cache. The same capture, run again, then writes only these shards.

    An undamaged cache stays unchanged, and so does every file that is not part of the cache. Exit code 1 if a problem
    remains that only a copy can solve.

    Example: todi-cache repair cache/ --dry-run
    """
    with progress_bar("shards") as progress:
        repair = repair_cache(cache, abandon=abandon, dry_run=dry_run, progress=progress)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, **dataclasses.asdict(repair)}, indent=1))
    else:
        click.echo("\n".join(_lines(cache, repair, dry_run=dry_run)))
    if repair.remaining:
        sys.exit(1)


def _lines(cache: str, repair: Repair, *, dry_run: bool) -> Iterator[str]:
    """Yield the work that was done, the problems that remain, and the captures to run again."""
    give_up, delete, write = ("would give up", "would delete", "would write") if dry_run else _PAST
    for part in repair.abandoned:
        yield f"{give_up} the capture of {describe_part(part)}"
    for key in repair.deleted:
        yield f"{delete} {key}"
    for key in repair.renewed:
        yield f"{write} {key} again"
    for problem in repair.remaining:
        yield f"not repaired: {problem.where}: {problem.what}\n    {problem.remedy.text}"
    if repair.parts:
        shards = ", ".join(map(str, repair.lost))
        effect = f"writes shard{'s' * (len(repair.lost) > 1)} {shards}" if shards else "finishes the cache"
        yield f"run the capture of {'; '.join(map(describe_part, repair.parts))} again: it {effect}"
    elif repair.is_whole:
        yield f"{cache} {'would be' if dry_run and repair.renewed else 'is'} whole"
