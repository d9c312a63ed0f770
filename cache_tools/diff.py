"""`todi-cache diff`: two caches in, how they differ out."""

import json
import sys
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cache_tools.progress import Progress, progress_bar
from todi_offline.cache.format.encoding import TargetRows
from todi_offline.cache.format.fingerprint import differences, locate
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
    caches = [open_cache(place, allow_unsealed=allow_unsealed) for place in (first, second)]
    with progress_bar("sequences") as progress:
        found = compare(caches[0], caches[1], progress)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    if found["manifest"] or found["only_first"] or found["only_second"] or found["targets"]["differing"]:
        sys.exit(1)


def compare(first: Cache, second: Cache, progress: Progress = lambda *_: None) -> dict[str, Any]:
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
        "targets": _targets(first, second, [(int(index), int(places[index])) for index in shared], progress),
    }


def _ids(cache: Cache, indices: Any) -> list[str]:
    return [cache.sequences["id"][index].as_py() for index in indices[:_SHOWN].tolist()]


def _targets(first: Cache, second: Cache, pairs: list[tuple[int, int]], progress: Progress) -> dict[str, Any]:
    """Compare the targets of shared sequences, rank by rank: how many ids differ, and how far the log-probs of others.

    `mean_kl` is that of the first's distributions to the second's.
    """
    found: dict[str, Any] = {"sequences": len(pairs), "differing": 0, "other_ids": 0.0, "largest_difference": 0.0}
    num_ids = num_other = num_targets = 0
    kl = 0.0
    for done, (mine, other) in enumerate(pairs):
        progress(done, len(pairs))
        a, b = first[mine].targets, second[other].targets
        k = min(a.ids.shape[1], b.ids.shape[1])
        same = a.ids[:, :k] == b.ids[:, :k]
        num_ids, num_other = num_ids + same.size, num_other + int((~same).sum())
        with np.errstate(invalid="ignore"):  # -inf beside -inf
            apart = np.nan_to_num(np.abs(a.logprobs[:, :k] - b.logprobs[:, :k]), posinf=np.inf)[same]
        found["largest_difference"] = max(found["largest_difference"], float(apart.max(initial=0)))
        num_targets += len(a)
        if not _equal(a, b):
            found["differing"] += 1
            kl += float(bucketed_kl(a, b).sum())
    progress(len(pairs), len(pairs))
    return found | {"other_ids": num_other / max(num_ids, 1), "mean_kl": kl / max(num_targets, 1)}


def bucketed_kl(first: TargetRows, second: TargetRows) -> npt.NDArray[np.float64]:
    """Return KL(first || second) of each target at temperature 1, over the ids that both keep and one for all others.

    Both are normalised: what is stored is rounded.
    """
    pairs = first.ids[:, :, None] == second.ids[:, None, :]
    p, rest_p = _split(first, pairs.any(axis=2))
    q, rest_q = _split(second, pairs.any(axis=1))
    in_order = (pairs * q[:, None, :]).sum(axis=2)  # in the columns of the first
    p, q = (np.column_stack([kept, rest]) for kept, rest in ((p, rest_p), (in_order, rest_q)))
    p, q = (mass / mass.sum(axis=1, keepdims=True) for mass in (p, q))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0)
    kl: npt.NDArray[np.float64] = terms.sum(axis=1)
    return kl


def _split(rows: TargetRows, shared: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the mass [target, k] of the shared entries, 0 for others, and that of all else [target]."""
    mass = np.exp(rows.logprobs, dtype=np.float64)
    kept = np.where(shared, mass, 0)
    if 1.0 not in rows.temperatures:
        return kept, (1 - kept.sum(axis=1)).clip(min=1e-9)
    tail = np.exp(rows.tail_logsumexp[:, rows.temperatures.index(1.0)], dtype=np.float64)
    return kept, tail + (mass - kept).sum(axis=1)


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
            f"    {targets['other_ids']:.2%} of ids are others than those of the same rank; where they are the same, "
            f"log-probs are at most {targets['largest_difference']:.3g} nats apart; mean KL of first to second "
            f"{targets['mean_kl']:.3g} nats"
        )
