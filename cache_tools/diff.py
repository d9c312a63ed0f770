"""`todi-cache diff`: two caches in, how they differ out."""

import json
import sys
from typing import Any

import click
import numpy as np

from todi_offline.cache.encoding import TargetRows
from todi_offline.cache.fingerprint import differences, locate
from todi_offline.cache.reader import Cache, open_cache

_SHOWN = 5


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--allow-unsealed", is_flag=True, help="Compare the committed parts of unfinished caches.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def command(first: str, second: str, allow_unsealed: bool, as_json: bool) -> None:
    """Compare two caches: what they say of themselves, and what they hold. Exit code 1 where they differ.

    Example: todi-cache diff monday/ tuesday/
    """
    found = compare(*(open_cache(place, allow_unsealed=allow_unsealed) for place in (first, second)))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    if found["manifest"] or found["only_first"] or found["only_second"] or found["targets"]["differing"]:
        sys.exit(1)


def compare(first: Cache, second: Cache) -> dict[str, Any]:
    """Return the differences of two caches; targets are compared where both hold the same content."""
    places = locate(second.content_keys, first.content_keys)
    only_second = np.flatnonzero(locate(first.content_keys, second.content_keys) < 0)
    shared = np.flatnonzero(places >= 0)
    return {
        "manifest": differences(first.manifest.to_json(), second.manifest.to_json(), ("first", "second")),
        "only_first": int((places < 0).sum()),
        "only_first_ids": _ids(first, np.flatnonzero(places < 0)),
        "only_second": len(only_second),
        "only_second_ids": _ids(second, only_second),
        "shared": len(shared),
        "targets": _targets(first, second, [(int(index), int(places[index])) for index in shared]),
    }


def _ids(cache: Cache, indices: Any) -> list[str]:
    return [cache.sequences["id"][index].as_py() for index in indices[:_SHOWN].tolist()]


def _targets(first: Cache, second: Cache, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Compare the targets of shared sequences: of the entries that both hold, how far the log-probs are apart."""
    found: dict[str, Any] = {"sequences": len(pairs), "differing": 0, "other_ids": 0.0, "largest_difference": 0.0}
    num_ids = num_other = 0
    for mine, other in pairs:
        a, b = first[mine].targets, second[other].targets
        k = min(a.ids.shape[1], b.ids.shape[1])
        same = a.ids[:, :k] == b.ids[:, :k]
        num_ids, num_other = num_ids + same.size, num_other + int((~same).sum())
        with np.errstate(invalid="ignore"):  # -inf beside -inf
            apart = np.nan_to_num(np.abs(a.logprobs[:, :k] - b.logprobs[:, :k]), posinf=np.inf)[same]
        found["largest_difference"] = max(found["largest_difference"], float(apart.max(initial=0)))
        found["differing"] += not _equal(a, b)
    return found | {"other_ids": num_other / num_ids if num_ids else 0.0}


def _equal(first: TargetRows, second: TargetRows) -> bool:
    mine, other = first.arrays(), second.arrays()
    return mine.keys() == other.keys() and all(np.array_equal(mine[name], other[name]) for name in mine)


def _print(found: dict[str, Any]) -> None:
    for line in found["manifest"]:
        click.echo(f"manifest  {line}")
    for where in ("first", "second"):
        if number := found[f"only_{where}"]:
            names = ", ".join(found[f"only_{where}_ids"]) + (", ..." if number > _SHOWN else "")
            click.echo(f"only in the {where}: {number:,} sequences: {names}")
    targets = found["targets"]
    click.echo(f"in both: {found['shared']:,} sequences, {targets['differing']:,} of them with other targets")
    if targets["differing"]:
        click.echo(
            f"    {targets['other_ids']:.2%} of the kept ids differ; where they are the same, log-probs are at most "
            f"{targets['largest_difference']:.3g} nats apart"
        )
