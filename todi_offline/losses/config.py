"""The settings of the objective in, a checked objective out."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from todi_offline.errors import ConfigError
from todi_offline.losses.divergences import Divergence, choices, require_two_arguments, resolve
from todi_offline.losses.positions import parse_selection

Schedule = Literal["constant", "linear-up", "linear-down", "wsd"]
Tail = Literal["auto", "bucket", "sampled", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """The objective: (1 - kd_weight) CE + kd_weight KD.

    Raises:
        ConfigError: a setting is unknown or out of range. Settings that depend on the targets are checked when used.
    """

    divergence: str | Divergence = "todi"
    """The divergence: a name in `todi_offline.losses.DIVERGENCES`, one that an installed package registers, or
    `module:function`."""
    beta: float = 1.0
    """Sharpness of ToDi's gate, -1 or more."""
    temperature: float = 1.0
    """Temperature of teacher and student; the cache must have been captured at it."""
    k: int | None = None
    """Most probable ids to use at each position; by default all that the cache holds. 0 uses only the samples."""
    tail: Tail = "auto"
    """How the other ids enter the loss; `auto` is `sampled` if the cache has samples, else `bucket`."""
    tail_weight: float | None = None
    """Weight of the sampled tail; by default it follows from the divergence (1 + beta for ToDi)."""
    head_weight: float = 1.0
    """Weight of the divergence among the k kept ids; 1 does not change the divergence."""
    mass_weight: float = 1.0
    """Weight of the divergence between the mass of the kept ids and that of the tail."""
    kd_weight: float = 0.5
    """Weight of distillation against cross-entropy: 0 is plain fine-tuning, 1 distillation alone."""
    kd_schedule: Schedule = "constant"
    """How kd_weight changes over the run: `linear-up` (from 0), `linear-down` (to 0) or `wsd` (up, stable, down)."""
    positions: str = "all"
    """The positions of KD: `all`, `student-entropy:0.2` (the fifth where the student is least sure) or `tip:0.5` (half
    of them: where the student is unsure, or sure and far from the teacher)."""

    def __post_init__(self) -> None:
        """Refuse unknown names, and numbers out of range."""
        require_two_arguments(resolve(self.divergence, self.beta).function)
        for name, value, known in (("tail", self.tail, Tail), ("kd_schedule", self.kd_schedule, Schedule)):
            if value not in get_args(known):
                raise ConfigError(f"{name} is {value!r}; expected {choices(value, get_args(known))}")
        if not 0 <= self.kd_weight <= 1:
            raise ConfigError(f"kd_weight is {self.kd_weight}; expected 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; expected more than 0")
        if self.k is not None and self.k < 0:
            raise ConfigError(f"k is {self.k}; expected 0 or more, or none for all that the cache holds")
        parse_selection(self.positions)
        self._check_weights_of_parts()

    def _check_weights_of_parts(self) -> None:
        weights = {"tail_weight": self.tail_weight, "head_weight": self.head_weight, "mass_weight": self.mass_weight}
        for name, weight in weights.items():
            if weight is not None and not 0 <= weight < math.inf:
                raise ConfigError(f"{name} is {weight}; expected 0 or more")
        if self.tail == "none" and not self.head_weight == self.mass_weight == 1:
            raise ConfigError(
                "head_weight and mass_weight need a tail, and tail is 'none'; leave them out, or choose a tail"
            )
