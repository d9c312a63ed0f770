"""Two caches in, their differences out: of the manifests, the sequences and the targets."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.fingerprint import differences
from todi_offline.cache.format.manifest import Manifest, describe_recipe
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.progress import Progress, no_progress
from todi_offline.cache.reader import Cache, read_all

SHOWN_IDS = 5
_BLOCK_ENTRIES = 2**17  # entries that are compared at once


def compare_caches(first: Cache, second: Cache, progress: Progress = no_progress) -> dict[str, Any]:
    """Return the differences of two caches; targets are compared for sequences with the same content."""
    places = second.content_keys.find(first.content_keys)
    only_second = np.flatnonzero(first.content_keys.find(second.content_keys) < 0)
    shared = np.flatnonzero(places >= 0)
    return {
        "manifest": _manifest_differences(first.manifest, second.manifest),
        "only_first": int((places < 0).sum()),
        "only_first_ids": _ids(first, np.flatnonzero(places < 0)),
        "only_second": len(only_second),
        "only_second_ids": _ids(second, only_second),
        "shared": len(shared),
        "targets": _targets(first, second, [(int(index), int(places[index])) for index in shared], progress),
    }


def _manifest_differences(first: Manifest, second: Manifest) -> list[str]:
    """Return a line for each difference; a part that only one cache has is described in words."""
    num_shared = min(len(first.parts), len(second.parts))
    mine, other = (
        dataclasses.replace(manifest, parts=manifest.parts[:num_shared]).to_json() for manifest in (first, second)
    )
    only = [
        f"parts.{number}: only {where}: {part.num_sequences:,} sequences, {describe_recipe(part.recipe)}"
        for where, manifest in (("first", first), ("second", second))
        for number, part in enumerate(manifest.parts[num_shared:], num_shared)
    ]
    return [*differences(mine, other, ("first", "second")), *only]


def _ids(cache: Cache, indices: Any) -> list[str]:
    return [cache.sequences["id"][index].as_py() for index in indices[:SHOWN_IDS].tolist()]


def _targets(first: Cache, second: Cache, pairs: list[tuple[int, int]], progress: Progress) -> dict[str, Any]:
    """Compare the targets of shared sequences rank by rank.

    `other_ids` is the share of ids that differ, `largest_difference` that of the log-probs where ids agree, in nats,
    and `mean_kl` the mean KL of the first cache's distributions to the second's.
    """
    found: dict[str, Any] = {"sequences": len(pairs), "differing": 0, "other_ids": 0.0, "largest_difference": 0.0}
    num_ids = num_other = num_targets = 0
    kl = 0.0
    mine = read_all(first, [number for number, _ in pairs])
    others = read_all(second, [number for _, number in pairs])
    for done, sequences in enumerate(zip(mine, others, strict=True)):
        progress(done, len(pairs))
        a, b = (sequence.targets for sequence in sequences)
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
    """Return KL(first || second) of each target at temperature 1, over the shared ids and one entry for all other ids.

    Both distributions are normalised first, because stored numbers are rounded.
    """
    size = max(_BLOCK_ENTRIES // max(first.ids.shape[1], second.ids.shape[1], 1), 1)
    blocks = [_kl(first[start : start + size], second[start : start + size]) for start in range(0, len(first), size)]
    kl: npt.NDArray[np.float64] = np.concatenate([np.empty(0), *blocks])
    return kl


def _kl(first: TargetRows, second: TargetRows) -> npt.NDArray[np.float64]:
    """Return `bucketed_kl` of a few targets; it takes some ten times their memory."""
    order = np.argsort(second.ids, axis=1)
    places = _places(first.ids, np.take_along_axis(second.ids, order, axis=1))
    is_shared = places >= 0
    q = np.zeros(is_shared.shape)
    if is_shared.any():
        ordered = np.exp(np.take_along_axis(second.logprobs, order, axis=1), dtype=np.float64)
        q = np.where(is_shared, np.take_along_axis(ordered, places.clip(min=0), axis=1), 0)
    p = np.where(is_shared, np.exp(first.logprobs, dtype=np.float64), 0)
    p, q = (np.column_stack([kept, _beyond(rows, kept)]) for rows, kept in ((first, p), (second, q)))
    p, q = (mass / mass.sum(axis=1, keepdims=True) for mass in (p, q))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0)
    kl: npt.NDArray[np.float64] = terms.sum(axis=1)
    return kl


def _places(wanted: npt.NDArray[Any], ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return where each wanted id [target, k] stands in its row of sorted ids [target, k], or -1."""
    rows, (num_targets, k) = np.arange(len(ids))[:, None], ids.shape
    if not k:
        return np.full(wanted.shape, -1)
    width = int(max(wanted.max(initial=0), ids.max(initial=0))) + 1
    keys = (rows * width + ids.astype(np.int64)).ravel()  # all rows as one sorted list
    asked = rows * width + wanted.astype(np.int64)
    found = np.searchsorted(keys, asked).clip(max=num_targets * k - 1)
    places: npt.NDArray[np.int64] = np.where(keys[found] == asked, found - rows * k, -1)
    return places


def _beyond(rows: TargetRows, shared: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mass [target] of all ids but the shared ones [target, k]."""
    beyond: npt.NDArray[np.float64]
    if 1.0 not in rows.temperatures:
        beyond = (1 - shared.sum(axis=1)).clip(min=1e-9)
        return beyond
    tail = np.exp(rows.tail_logsumexp[:, rows.temperatures.index(1.0)], dtype=np.float64)
    kept = np.exp(rows.logprobs, dtype=np.float64).sum(axis=1)
    beyond = tail + (kept - shared.sum(axis=1)).clip(min=0)
    return beyond


def _equal(first: TargetRows, second: TargetRows) -> bool:
    mine, other = first.arrays(), second.arrays()
    return mine.keys() == other.keys() and all(np.array_equal(mine[name], other[name]) for name in mine)
