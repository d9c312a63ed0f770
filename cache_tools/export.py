"""`todi-cache export`: a cache in, a Parquet table out."""

import json
from pathlib import Path

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.export import LAYOUTS, export_cache
from todi_offline.cache.reader import open_cache


@click.command()
@click.argument("cache")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The Parquet file: a local NAME.parquet.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="plain", show_default=True, help="The columns to write.")
@click.option("--temperature", type=float, default=1.0, help="For the layout axolotl: its kd_temperature.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(cache: str, out: Path, layout: str, temperature: float, as_json: bool) -> None:
    """Write a cache as Parquet, with a row for each sequence.

    plain: id, source, input_ids, target_mask, target_ids, target_logprobs, tail_logsumexp, label_logprob, tail_ids,
    tail_logprobs, log_partition; `todi-cache import` reads this layout. axolotl: the columns of axolotl's offline
    distillation, releases 0.11 and later; set kd_normalize_topk: false, because the other ids keep their mass.

    Example: todi-cache export cache/ --out targets.parquet
    """
    with progress_bar("sequences") as progress:
        rows = export_cache(open_cache(cache), out, layout, temperature, progress)
    summary = {"rows": rows, "bytes": out.stat().st_size, "layout": layout}
    click.echo(json.dumps(summary) if as_json else f"{out} has {rows:,} rows, {summary['bytes']:,} bytes")
