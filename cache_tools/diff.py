"""`todi-cache diff`: two caches in, their differences out."""

import json
import sys
from typing import Any

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.check.diff import SHOWN_IDS, compare_caches
from todi_offline.cache.reader import open_cache


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--allow-unsealed", is_flag=True, help="Compare the committed parts of unfinished caches.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def command(first: str, second: str, allow_unsealed: bool, as_json: bool) -> None:
    """Compare the manifests, sequences and targets of two caches. Exit code 1 if they differ.

    Example: todi-cache diff monday/ tuesday/
    """
    caches = [open_cache(place, allow_unsealed=allow_unsealed) for place in (first, second)]
    with progress_bar("sequences") as progress:
        found = compare_caches(caches[0], caches[1], progress)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    if found["manifest"] or found["only_first"] or found["only_second"] or found["targets"]["differing"]:
        sys.exit(1)


def _print(found: dict[str, Any]) -> None:
    for line in found["manifest"]:
        click.echo(f"manifest  {line}")
    for where in ("first", "second"):
        if number := found[f"only_{where}"]:
            names = ", ".join(found[f"only_{where}_ids"]) + (", ..." if number > SHOWN_IDS else "")
            click.echo(f"only in the {where}: {number:,} sequences: {names}")
    targets = found["targets"]
    click.echo(f"in both: {found['shared']:,} sequences, {targets['differing']:,} of them with different targets")
    if targets["differing"]:
        click.echo(
            f"    {targets['other_ids']:.2%} of ids differ at the same rank; log-probs of equal ids are at "
            f"most {targets['largest_difference']:.3g} nats apart; mean KL of first to second {targets['mean_kl']:.3g} "
            "nats"
        )
