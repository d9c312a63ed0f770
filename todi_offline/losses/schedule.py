"""The settings of the objective and how far a run has come in, the settings with the weight of KD at that point out."""

import dataclasses

from todi_offline.losses.config import DistillationConfig

WARMUP, DECAY = 0.1, 0.2
"""Shares of the run in which `wsd` rises and falls. They are ours."""


def scheduled(config: DistillationConfig, progress: float) -> DistillationConfig:
    """Return the settings with kd_weight as it is at `progress`, 0 at the start of the run and 1 at its end.

    - constant: kd_weight throughout
    - linear-up: from 0 to kd_weight
    - linear-down: from kd_weight to 0
    - wsd: up from 0 in the first tenth of the run, kd_weight, and down to 0 in the last fifth

    Warm-up, stable, decay of the weight: Peng et al. 2024, arXiv 2410.16215.
    """
    factor = {
        "constant": 1.0,
        "linear-up": progress,
        "linear-down": 1 - progress,
        "wsd": min(progress / WARMUP, 1.0, (1 - progress) / DECAY),
    }[config.kd_schedule]
    return config if factor == 1 else dataclasses.replace(config, kd_weight=factor * config.kd_weight)
