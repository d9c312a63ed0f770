"""`todi-cache subset`: a cache in, a smaller one out."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from cache_tools.progress import progress_bar
from todi_offline.cache.convert.subset import Selection, subset_cache, where, with_content, with_ids
from todi_offline.cache.format.fingerprint import as_keys
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.errors import ConfigError, DataError


@click.command()
@click.argument("cache")
@click.option("--out", required=True, help="Where the smaller cache is written: a folder or URL.")
@click.option("--ids", type=click.Path(path_type=Path), help="A file of sequence ids, one a line.")
@click.option(
    "--keys", type=click.Path(path_type=Path), help="A file of content keys, one a line: `todi keys` makes it."
)
@click.option("--like", help="Another cache: the sequences with the content of its.")
@click.option("--where", "expression", help="A condition, e.g. 'teacher_nll < 2.5 and topk_mass > 0.9'.")
@click.option("--limit", type=click.IntRange(1), help="The first of those that are chosen, this many.")
@click.option("--k", type=int, help="Entries kept a position.")
@click.option("--temperature", "temperatures", type=float, multiple=True, help="Temperatures kept.")
@click.option("--tail-samples", type=int, help="Samples kept a position.")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="How log-probs are stored.")
@click.option("--codec", type=click.Choice(CODECS), help="How arrays are compressed.")
@click.option("--shard-tokens", type=int, help="Tokens a shard can hold.")
@click.option("--allow-unsealed", is_flag=True, help="Take the committed part of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(cache: str, out: str, allow_unsealed: bool, as_json: bool, **options: Any) -> None:
    """Write some sequences of a cache to another, with fewer entries, or stored otherwise.

    Conditions add up. Columns for --where: id, source, num_tokens, num_targets, teacher_nll, topk_mass.

    Example: todi-cache subset cache/ --where "teacher_nll < 2.5" --k 16 --out small/
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    criteria = {name: options.pop(name) for name in ("ids", "keys", "like", "expression", "limit")}
    chosen, recipe = choose(opened, **criteria)
    settings = {name: value for name, value in options.items() if value not in (None, ())}
    with progress_bar("shards") as progress:
        subset_cache(opened, out, chosen, recipe, progress, **settings)
    written = open_cache(out)
    summary = {
        "sequences": len(written),
        "of": len(opened),
        "targets": int(written.num_targets.sum()),
        "bytes_per_target": sum(written.bytes_by_array.values()) / int(written.num_targets.sum()),
    }
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    click.echo(f"{out} holds {summary['sequences']:,} of {summary['of']:,} sequences, {summary['targets']:,} targets")
    click.echo(f"{summary['bytes_per_target']:.1f} bytes a target")
    before, after = opened.manifest.settings.encoding, written.manifest.settings.encoding
    if before != after:
        click.echo(f"log-probs are rounded twice, as {before} and as {after}; all else is exact")


def choose(
    cache: Cache, ids: Path | None, keys: Path | None, like: str | None, expression: str | None, limit: int | None
) -> tuple[Selection, dict[str, Any]]:
    """Return the sequences that meet all conditions, and what a manifest says of them: no path, but what was in it."""
    chosen, recipe = np.ones(len(cache), np.bool_), dict[str, Any]()
    if ids is not None:
        chosen &= with_ids(cache, names := _lines(ids))
        recipe["ids"] = len(names)
    if keys is not None:
        chosen &= with_content(cache, as_keys(found := _keys(keys)))
        recipe["keys"] = len(found)
    if like is not None:
        chosen &= with_content(cache, open_cache(like).content_keys)
        recipe["like"] = True
    if expression is not None:
        chosen &= where(cache, expression)
        recipe["where"] = expression
    if limit is not None:
        chosen &= np.cumsum(chosen) <= limit
        recipe["limit"] = limit
    return chosen, recipe


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; name a text file with one entry a line") from error


def _keys(path: Path) -> list[bytes]:
    try:
        found = [bytes.fromhex(line) for line in _lines(path)]
    except ValueError as error:
        raise DataError(
            f"{path} holds something else than content keys: {error}; `todi keys` makes such a file"
        ) from error
    if any(len(key) != 16 for key in found):
        raise ConfigError(f"{path} holds keys of another length than 16 bytes; `todi keys` makes such a file")
    return found
