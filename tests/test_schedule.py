"""The schedule of the KD weight over a run."""

import jaxtyping
import pytest

from todi_offline.errors import ConfigError
from todi_offline.losses import DistillationConfig
from todi_offline.losses.schedule import scheduled


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.4]),
        ("linear-up", [0.0, 0.02, 0.2, 0.36, 0.4]),
        ("linear-down", [0.4, 0.38, 0.2, 0.04, 0.0]),
        ("wsd", [0.0, 0.2, 0.4, 0.2, 0.0]),
    ],
)
def test_the_weight_rises_stays_and_falls_as_its_schedule_says(schedule, weights):
    config = DistillationConfig(kd_weight=0.4, kd_schedule=schedule, divergence="forward_kl")
    found = [scheduled(config, progress) for progress in (0.0, 0.05, 0.5, 0.9, 1.0)]
    assert [each.kd_weight for each in found] == pytest.approx(weights)
    assert {each.divergence for each in found} == {"forward_kl"}


def test_an_unknown_schedule_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would notice it first
    with pytest.raises(
        ConfigError, match=r"kd_schedule is 'linear'; expected one of constant, .*; did you mean 'linear-"
    ):
        DistillationConfig(kd_schedule="linear")
