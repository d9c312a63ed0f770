"""`todi-cache import`: a Parquet table in, a cache out."""

import json
from pathlib import Path
from typing import Any

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.describing import describe_table
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.reader import open_cache


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--out", required=True, help="Where the cache is written: a folder or URL.")
@click.option("--teacher", help="The teacher's name; a table of `todi-cache export` has it already.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="The folder of the teacher's tokenizer.")
@click.option("--k", type=int, help="Entries of a target. [default: as many as the shortest target has]")
@click.option(
    "--temperature", "temperatures", type=float, multiple=True, help="Temperatures of tail_logsumexp. [default: 1]"
)
@click.option("--tail-samples", type=int, help="Samples of a target. [default: 0]")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="How log-probs are stored.")
@click.option("--codec", type=click.Choice(CODECS), help="How arrays are compressed.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(table: Path, out: str, teacher: str | None, tokenizer: Path | None, as_json: bool, **settings: Any) -> None:
    """Make a cache from the targets of another program, e.g. the top log-probs of a serving engine.

    The table has a row for each sequence. input_ids: the tokens. target_mask: true at t if the prediction made at t,
    for token t + 1, is given; or `positions`, the numbers t. target_ids and target_logprobs (natural logs): a list of k
    entries in any order for each prediction, and the label's entry if it is not among these. Optional are
    tail_logsumexp and label_logprob. Without tail_logsumexp the mass of the tail is 1 minus the kept mass, up to
    rounding.

    Example: todi-cache import targets.parquet --teacher my-70b --tokenizer tokenizer/ --k 20 --out cache/
    """
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    described, tokenizer_json = describe_table(table, teacher, tokenizer, given)
    with progress_bar("rows") as progress:
        import_table(table, out, described, tokenizer_json, progress)
    cache = open_cache(out)
    summary = {"sequences": len(cache), "targets": int(cache.num_targets.sum())}
    text = f"{out} holds {summary['sequences']:,} sequences, {summary['targets']:,} targets"
    click.echo(json.dumps(summary) if as_json else text)
