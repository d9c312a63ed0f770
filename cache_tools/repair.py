"""`todi-cache repair`: a damaged cache in, the same without what is damaged out."""

import dataclasses
import json
import sys
from collections.abc import Iterator

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.appending import described
from todi_offline.cache.check.repair import Repair, repair_cache


@click.command()
@click.argument("cache")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def command(cache: str, dry_run: bool, as_json: bool) -> None:
    """Delete what is damaged, so that the same capture again recomputes just that. A whole cache is left as it is.

    Exit code 1 where something is left that no deletion mends.

    Example: todi-cache repair cache/ --dry-run
    """
    with progress_bar("shards") as progress:
        repair = repair_cache(cache, dry_run=dry_run, progress=progress)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, **dataclasses.asdict(repair)}, indent=1))
    else:
        click.echo("\n".join(_lines(cache, repair, dry_run=dry_run)))
    if repair.left:
        sys.exit(1)


def _lines(cache: str, repair: Repair, *, dry_run: bool) -> Iterator[str]:
    """Yield what was done, what is left, and what is to be run."""
    for key in repair.deleted:
        yield f"{'would delete' if dry_run else 'deleted'} {key}"
    for problem in repair.left:
        yield f"left as it is: {problem.where}: {problem.what}\n    to mend it: {problem.remedy.text}"
    if not repair.left and repair.is_sealed and not (dry_run and repair.deleted):
        yield f"{cache} is whole"
    if not repair.is_sealed and all(problem.where != "zarr.json" for problem in repair.left):
        whose = "; ".join(map(described, repair.parts))
        shards = ", ".join(map(str, repair.shards))
        what = f"makes anew shard{'s' * (len(repair.shards) > 1)} {shards}" if shards else "finishes the cache"
        yield f"to go on, run what wrote it again{f' ({whose})' if whose else ''}: it {what}"
