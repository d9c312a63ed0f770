"""A cache in, the sequences that its page shows out: a seeded sample and the worst, up to a size of the file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from todi_offline.cache.reader import Cache

BUDGET_MB = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A sequence that a page shows, by its number in the cache, and the reason."""

    number: int
    why: str


def shown_sequences(
    cache: Cache,
    chosen: npt.NDArray[np.int64] | None,
    *,
    bytes_per_token: float,
    bytes_per_target: float,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
) -> list[Shown]:
    """Return sequences whose data take about `budget_mb` in the file, at least one.

    They are the first of `chosen`, if given. Else they alternate between a random sample, the highest teacher NLL and
    the least kept mass.
    """
    candidates = _sample_and_worst(cache, seed) if chosen is None else {"chosen": chosen}
    budget = left = budget_mb * 1e6
    found: dict[int, Shown] = {}
    for number, why in _by_turns(candidates):
        cost = bytes_per_token * int(cache.num_tokens[number]) + bytes_per_target * int(cache.num_targets[number])
        if number not in found and (cost <= left or not found):
            found[number] = Shown(number, why)
            left -= cost
        if left < 0.01 * budget:
            break
    order = list(candidates)
    return sorted(found.values(), key=lambda shown: order.index(shown.why))  # stable: each kind in its own order


def _by_turns(candidates: Mapping[str, npt.NDArray[np.int64]]) -> Iterator[tuple[int, str]]:
    """Yield the first of each kind, then the second of each."""
    for numbers in zip(*candidates.values(), strict=True):
        yield from zip(map(int, numbers), candidates, strict=True)


def _sample_and_worst(cache: Cache, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    columns = cache.columns
    return {
        "highest teacher NLL": np.argsort(-columns["teacher_nll"], kind="stable"),
        "least kept mass": np.argsort(columns["topk_mass"], kind="stable"),
        "random": np.random.default_rng(seed).permutation(len(cache)),
    }
