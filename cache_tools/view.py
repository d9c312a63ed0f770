"""`todi-cache view`: a cache in, a page that shows it out."""

import json
from pathlib import Path

import click
import numpy as np

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.choosing import choose
from todi_offline.cache.reader import open_cache
from todi_offline.pages.cache_page import cache_page
from todi_offline.pages.choosing import BUDGET_MB


@click.command()
@click.argument("cache")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The HTML file.")
@click.option("--ids", type=click.Path(path_type=Path), help="Show these sequences: a file of ids, one a line.")
@click.option("--where", "expression", help="Show sequences that meet a condition, e.g. 'teacher_nll > 4'.")
@click.option("--budget", default=BUDGET_MB, show_default=True, help="MB of the file that the text may take.")
@click.option("--allow-unsealed", is_flag=True, help="Show the committed shards of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers of the page as JSON too.")
def command(
    cache: str, out: Path, ids: Path | None, expression: str | None, budget: float, allow_unsealed: bool, as_json: bool
) -> None:
    """Write a page that shows a cache: its contents, its size, and text with the teacher's predictions.

    The page is one file that opens in a browser without a network. It shows a random sample, the sequences with the
    highest teacher NLL, and those with the least kept mass.

    Example: todi-cache view cache/ --out cache.html
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    chosen = None
    if ids is not None or expression is not None:
        chosen = np.flatnonzero(choose(opened, ids, None, None, expression, None)[0])
    with progress_bar("sequences") as progress:
        page = cache_page(opened, chosen, budget_mb=budget, progress=progress)
    page.write(out)
    click.echo(json.dumps(page.to_json(), indent=1) if as_json else f"{out} has {out.stat().st_size:,} bytes")
