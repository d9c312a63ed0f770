"""`todi-cache import`: a Parquet table in, a cache out."""

import json
from pathlib import Path
from typing import Any

import click

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.importing import fewest_entries, import_table, imported_manifest
from todi_offline.cache.convert.tokenizer_files import read_tokenizer_files
from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import CODECS, ENCODINGS, CacheSettings
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.reader import open_cache
from todi_offline.config import load_config
from todi_offline.errors import ConfigError


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--out", required=True, help="Where the cache is written: a folder or URL.")
@click.option("--teacher", help="The teacher's name; a table of `todi-cache export` brings it.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="The folder of the teacher's tokenizer.")
@click.option("--k", type=int, help="Entries of a target. [default: what the shortest has]")
@click.option("--temperature", "temperatures", type=float, multiple=True, help="Those of tail_logsumexp. [default: 1]")
@click.option("--tail-samples", type=int, help="Samples of a target. [default: 0]")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="How log-probs are stored.")
@click.option("--codec", type=click.Choice(CODECS), help="How arrays are compressed.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(table: Path, out: str, teacher: str | None, tokenizer: Path | None, as_json: bool, **settings: Any) -> None:
    """Make a cache of targets that come from elsewhere, e.g. the top log-probs of a serving engine.

    The table has a row a sequence with input_ids and target_mask (true at t where the prediction made at t, for token
    t + 1, is given; or `positions`, the numbers t) and, for every true one, target_ids and target_logprobs (natural
    logs; k of them, in any order, and the label's where it is not among those); tail_logsumexp and label_logprob where
    they are known. Without tail_logsumexp the tail is what the kept leave of 1, as far as their rounding lets it tell.

    Example: todi-cache import targets.parquet --teacher my-70b --tokenizer tokenizer/ --k 20 --out cache/
    """
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    described, tokenizer_json = describe(table, teacher, tokenizer, given)
    with progress_bar("rows") as progress:
        import_table(table, out, described, tokenizer_json, progress)
    cache = open_cache(out)
    summary = {"sequences": len(cache), "targets": int(cache.num_targets.sum())}
    text = f"{out} holds {summary['sequences']:,} sequences, {summary['targets']:,} targets"
    click.echo(json.dumps(summary) if as_json else text)


def describe(
    table: Path, teacher: str | None, tokenizer: Path | None, settings: dict[str, Any]
) -> tuple[Manifest | None, str | None]:
    """Return the manifest and the tokenizer of a table that brings none; nothing where it is to bring them."""
    if teacher is None and tokenizer is None and not settings:
        return None, None
    if teacher is None or tokenizer is None:
        raise ConfigError(
            "a table that brings no manifest needs --teacher and --tokenizer; one that `todi-cache export` wrote is "
            "imported as it is, without options, and `todi-cache subset` then stores it otherwise"
        )
    files = read_tokenizer_files(tokenizer)
    settings = {"temperatures": (1.0,), "tail_samples": 0, "k": settings.get("k") or fewest_entries(table), **settings}
    chosen = load_config(CacheSettings, overrides=settings)
    vocab_size = max(files.get_vocab().values()) + 1
    manifest = imported_manifest(chosen, vocab_size, teacher, tokenizer_fingerprint(files))
    return manifest, files.backend_tokenizer.to_str()
