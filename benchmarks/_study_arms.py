"""The name of a grid in, the arms of the study out: the targets, the start and the seed of each training run."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from todi_offline.losses.divergences import resolve

LOSSES = ("todi", "forward_kl", "reverse_kl", "js", "skew_forward_kl", "adaptive_kl")
WEIGHTS = (0.3, 0.5, 0.7)
NUM_DRAWS = 12
"""Ids drawn for random-sampling KD."""


def matched(kd_weight: float, loss: str = "forward_kl") -> float:
    """Return the weight at which a loss pulls as ToDi does at `kd_weight`, near q = p and beside cross-entropy."""
    strength = resolve("todi", 1.0).strength / resolve(loss, 1.0).strength
    odds = strength * kd_weight / (1 - kd_weight)
    return round(odds / (1 + odds), 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One training run: a row of the CSV."""

    start: Literal["warm", "cold"] = "warm"
    seed: int = 0
    targets: Literal["none", "dense", "cached", "renormalised", "random"]
    """None is plain fine-tuning; dense is the teacher itself, beside the student; renormalised makes a distribution of
    the top k alone; random is ids drawn from the whole teacher distribution, each as likely as its share of draws."""
    loss: str = "forward_kl"
    k: int = 0
    tail: Literal["", "none", "bucket", "sampled"] = ""
    samples: int = 0
    temperature: float = 1.0
    kd_weight: float = 0.5
    tail_weight: float = 0.0
    """Weight of the sampled tail; 0 is the divergence's own."""
    encoding: str = "f16"
    """The encoding of the cache."""
    drawn_at: float = 1.0
    """The temperature at which the samples are drawn."""
    settings: str = ""
    """Other settings of the objective, as `name=value`, separated by spaces."""

    @property
    def label(self) -> str:
        """The name of the arm in tables, without start and seed."""
        if self.targets == "none":
            return "SFT"
        of = {"dense": "dense", "renormalised": f"top {self.k} renormalised", "random": f"{self.samples} random draws"}
        tail = {"none": " no tail", "bucket": " bucket", "sampled": f"+{self.samples}"}.get(self.tail, "")
        parts = [self.loss, of.get(self.targets, f"K={self.k}{tail}")]
        parts += [f"T={self.temperature:g}"] if self.temperature != 1 else []
        parts += [f"w={self.kd_weight:g}"] if self.kd_weight != 0.5 else []
        parts += [f"tail weight {self.tail_weight:g}"] if self.tail_weight else []
        parts += [self.encoding] if self.encoding != "f16" else []
        parts += [f"drawn at T={self.drawn_at:g}"] if self.drawn_at != 1 else []
        parts += [self.settings] if self.settings else []
        return " ".join(parts)


def cached(k: int, samples: int = 0, loss: str = "todi", **settings: Any) -> Arm:
    """Return an arm that learns from a cache: with the sampled tail if there are samples, else with a bucket."""
    tail: Any = "sampled" if samples else "bucket"
    return Arm(**{"targets": "cached", "loss": loss, "k": k, "tail": tail, "samples": samples} | settings)


SFT = Arm(targets="none", loss="", kd_weight=0.0)
DENSE = Arm(targets="dense", loss="todi")
DENSE_FORWARD_KL = [Arm(targets="dense"), Arm(targets="dense", kd_weight=matched(0.5))]
REFERENCES = [
    Arm(targets="renormalised", k=8),
    Arm(targets="random", samples=NUM_DRAWS),
    Arm(targets="random", samples=NUM_DRAWS, kd_weight=matched(0.5)),
]
BARS = {(64, 8): 0.97, (16, 8): 0.92, (8, 4): 0.88}
"""The least share that K kept ids and S samples must recover, for a vocabulary of 4,096 or more."""
BARS_OF_SMALL_VOCABULARY = {(8, 4): 0.98}


def arms_of(grid: str, seeds: int) -> list[Arm]:
    """Return the arms of a grid, the seeds outermost, so that the first rows compare all arms."""
    starts: dict[str, list[Arm]] = {
        "quick": [*_each(_quick(), "warm"), *_each([SFT, DENSE, cached(16, 8), cached(8)], "cold")],
        "bars": _each([SFT, DENSE, *(cached(*key) for key in BARS), *DENSE_FORWARD_KL], "warm"),
        "choice": [*_each(_choice(), "warm"), *_each(_choice_when_cold(), "cold")],
        "knobs": _each(knobs(), "warm"),
        "weights": _each(weights(), "warm"),
        "full": [*_each(_full(), "warm"), *_each(_full(), "cold")],
    }
    return [dataclasses.replace(arm, seed=seed) for seed in range(seeds) for arm in starts[grid]]


def _each(arms: Iterable[Arm], start: Any) -> list[Arm]:
    return [dataclasses.replace(arm, start=start) for arm in dict.fromkeys(arms)]


def _quick() -> Iterator[Arm]:
    yield from (SFT, DENSE, *DENSE_FORWARD_KL)
    yield from (cached(64, 8), cached(16, 8), cached(8, 4), cached(8), cached(8, tail="none"))
    yield from (REFERENCES[0], REFERENCES[2])


def _choice() -> Iterator[Arm]:
    """Yield arms that vary k, tail, temperature, weight and divergence, one at a time."""
    yield from (SFT, DENSE, *(cached(*key) for key in BARS))
    yield from (cached(k, samples) for k in (4, 8, 16, 32, 64) for samples in (0, 4, 8))
    yield from (cached(k, tail="none") for k in (8, 64))
    yield from (cached(*key, encoding="root8") for key in (*BARS, (16, 0)))
    yield from REFERENCES
    yield dataclasses.replace(DENSE, temperature=2.0)
    yield from (cached(16, samples, temperature=2.0) for samples in (0, 8))
    yield cached(16, 8, temperature=2.0, drawn_at=2.0)
    yield from (dataclasses.replace(DENSE, kd_weight=weight) for weight in WEIGHTS)
    yield from (Arm(targets="dense", kd_weight=weight) for weight in (*WEIGHTS, *map(matched, WEIGHTS)))
    yield from (cached(16, 8, loss, kd_weight=w) for w in (0.5, matched(0.5)) for loss in LOSSES)
    yield from (cached(16, 8, tail_weight=weight) for weight in (1.5, 2.5, 3.0))


def _choice_when_cold() -> Iterator[Arm]:
    yield from (SFT, DENSE, *DENSE_FORWARD_KL, cached(64, 8), cached(16, 8), cached(16), cached(8, 4), cached(8))


def _full() -> Iterator[Arm]:
    yield SFT
    yield from (
        Arm(targets="dense", loss=loss, temperature=temperature, kd_weight=weight)
        for loss, temperature, weight in itertools.product(LOSSES[:2], (1.0, 2.0), (*WEIGHTS, *map(matched, WEIGHTS)))
    )
    for k in (4, 8, 16, 32, 64):
        for loss, temperature in itertools.product(LOSSES, (1.0, 2.0)):
            yield cached(k, loss=loss, temperature=temperature, tail="none")
            yield cached(k, 0, loss, temperature=temperature)
            yield from (cached(k, samples, loss, temperature=temperature, drawn_at=temperature) for samples in (4, 8))
        yield Arm(targets="renormalised", k=k)
    for loss, weight in itertools.product(LOSSES, (*WEIGHTS, *map(matched, WEIGHTS))):
        yield cached(16, 8, loss, kd_weight=weight)
    yield from REFERENCES


def weights() -> Iterator[Arm]:
    """Yield the weights of the parts of KL, one changed at a time, beside no cross-entropy.

    There the parts compete with each other alone: AdamW does not feel a factor that all of them have.
    """
    base = functools.partial(cached, 16, 8, encoding="root8", kd_weight=1.0)
    yield from (SFT, DENSE, dataclasses.replace(DENSE, kd_weight=1.0))
    yield from (base(tail_weight=weight) for weight in (0.0, 1.0, 3.0, 4.0))
    yield from (base(settings=f"{part}_weight=2") for part in ("head", "mass"))


def knobs() -> Iterator[Arm]:
    """Yield ToDi from a cache of K = 16 with 8 samples, and one changed setting of the objective at a time."""
    base = functools.partial(cached, 16, 8, encoding="root8")
    yield from (SFT, base(), DENSE, base(loss="forward_kl", kd_weight=matched(0.5)))
    yield from (base(tail_weight=weight) for weight in (1.0, 3.0))
    yield from (base(settings=f"{part}_weight={weight}") for part in ("head", "mass") for weight in (0.5, 2))
    yield cached(0, 12, "forward_kl", encoding="root8", kd_weight=matched(0.5))
    yield REFERENCES[2]
    yield from (
        base(loss=loss, kd_weight=matched(0.5, loss)) for loss in ("entropy_gate", "concrete_score", "alpha_mixture")
    )
    yield from (base(settings=f"positions={positions}") for positions in ("student-entropy:0.2", "tip:0.5"))
    yield from (base(settings=f"kd_schedule={schedule}") for schedule in ("linear-up", "linear-down", "wsd"))
    yield from (base(kd_weight=1.0, settings=each) for each in ("", "positions=student-entropy:0.2"))
