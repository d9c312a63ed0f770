"""A shape of targets in, the share of dense ToDi's gain that the studies measured for it out.

The numbers are those of benchmarks/results/study-real.md (SmolLM2-135M-Instruct, 49,152 ids) and study-choice.md (a
teacher of 4,096 ids trained on the spot); bytes a target are those of bytes.json (SmolLM2 over Dolly, codec compact).
All were measured at T = 1. `root8` costs a student nothing (study-choice.md), so a share holds for every encoding.
"""

from dataclasses import dataclass

REQUIRED_SHARE = 0.9
"""Of dense ToDi's gain in forward KL, in every study: what a shape needs to be suggested."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of what dense ToDi gains over plain fine-tuning; None where the study did not measure it."""

    forward_kl: float | None = None
    """In held-out forward KL, with a real teacher."""
    reverse_kl: float | None = None
    """In held-out reverse KL, with a real teacher."""
    small_warm: float | None = None
    """In forward KL, with the small teacher and a student that was fine-tuned first."""
    small_cold: float | None = None
    """In forward KL, with the small teacher and a student that starts cold."""

    @property
    def worst(self) -> float | None:
        """The least share of forward KL in any study, None where no study has the shape."""
        shares = [share for share in (self.forward_kl, self.small_warm, self.small_cold) if share is not None]
        return min(shares, default=None)


SHARES: dict[tuple[int, int], Shares] = {
    (4, 8): Shares(small_warm=0.988),
    (8, 4): Shares(forward_kl=1.010, reverse_kl=0.545, small_warm=0.954, small_cold=0.779),
    (8, 8): Shares(small_warm=0.988),
    (16, 0): Shares(small_warm=0.494, small_cold=0.561),
    (16, 8): Shares(forward_kl=1.039, reverse_kl=0.576, small_warm=0.987, small_cold=0.947),
    (32, 0): Shares(small_warm=0.562),
    (32, 8): Shares(forward_kl=1.054, reverse_kl=0.586, small_warm=0.981),
    (64, 0): Shares(forward_kl=0.869, reverse_kl=0.540, small_warm=0.629),
    (64, 8): Shares(small_warm=0.980, small_cold=0.953),
}
"""By k and tail samples; without samples the tail is one bucket."""

BYTES: dict[tuple[int, int, str], float] = {
    (8, 4, "f16"): 44.9,
    (8, 4, "q8"): 39.3,
    (8, 4, "root8"): 28.9,
    (16, 8, "f16"): 77.6,
    (16, 8, "q8"): 68.5,
    (16, 8, "root8"): 53.0,
    (32, 8, "f16"): 115.9,
    (32, 8, "q8"): 100.8,
    (32, 8, "root8"): 78.9,
    (64, 0, "f16"): 164.2,
    (64, 0, "q8"): 138.5,
    (64, 0, "root8"): 105.5,
}
"""Bytes a target by k, tail samples and encoding: of all that belongs to a target, tokens apart."""

SHAPES = ((8, 4), (16, 8), (32, 8), (64, 8), (64, 0))
"""Of the table: k and tail samples."""

ENCODINGS = ("f16", "root8")
"""Of the table: the default, and the one with the fewest bytes."""


def shares_of(k: int, tail_samples: int) -> Shares:
    """Return what the studies measured for a shape; nothing where they did not have it."""
    return SHARES.get((k, tail_samples), Shares())
