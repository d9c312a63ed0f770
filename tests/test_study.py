"""The arithmetic and the grid of `benchmarks study`, without its runs."""

import csv

import numpy as np
import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, llama

from benchmarks import study
from benchmarks._study_arms import DENSE, SFT, Arm, arms_of, cached, matched
from benchmarks._study_losses import bytes_of_draws, calibration_error, objective_of, random_draws, renormalised
from benchmarks._study_report import arm_of, summarise, write_report
from benchmarks._study_world import Settings, World, batches
from todi_offline.data import Examples
from todi_offline.losses import sparse_divergence
from todi_offline.targets.sparse import sparsify
from todi_offline.teacher.in_transformers import as_teacher
from todi_offline.training.stream import ShuffledOrder

ARMS = [
    SFT,
    DENSE,
    cached(8, 2),
    cached(8),
    cached(8, tail="none", temperature=2.0),
    Arm(targets="renormalised", k=8),
    Arm(targets="random", samples=3),
    cached(0, 3, "forward_kl", encoding="root8"),
    cached(8, 2, settings="positions=tip:0.5 kd_schedule=wsd head_weight=2"),
]


@pytest.fixture(scope="module")
def world(examples: Examples, heldout_examples: Examples) -> World:
    students = {"warm": llama(seed=1), "cold": llama(seed=2)}
    settings = Settings(steps=3, batch_sequences=4)
    return World(settings, as_teacher(llama(), tiny_tokenizer()), students, examples, heldout_examples)


def row(start="warm", seed=0, arm=SFT, forward_kl=1.0):
    fields = {name: str(getattr(arm, name)) for name in Arm.__dataclass_fields__}
    measures = dict.fromkeys(study.MEASURES, "0.0") | {"forward_kl": str(forward_kl)}
    return fields | {"start": start, "seed": str(seed)} | measures


@pytest.mark.parametrize("grid", ["quick", "bars", "knobs", "weights", "choice", "full"])
def test_no_two_arms_of_a_grid_are_the_same_row_of_a_table(grid):
    arms = arms_of(grid, 2)
    assert len({(arm.start, arm.seed, arm.label) for arm in arms}) == len(arms)


def test_every_grid_has_the_arms_that_shares_refer_to():
    for grid in ("quick", "bars", "knobs", "weights", "choice", "full"):
        arms = arms_of(grid, 1)
        for start in {arm.start for arm in arms}:
            labels = {arm.label for arm in arms if arm.start == start}
            assert {SFT.label, DENSE.label} <= labels


def test_an_arm_survives_the_csv():
    for arm in (*arms_of("full", 1), *arms_of("knobs", 1), *arms_of("weights", 1)):
        assert arm_of(row(arm.start, arm.seed, arm)) == arm


def test_shares_are_counted_within_a_seed_and_a_start():
    arm = cached(8, 2)
    rows = [
        row(arm=SFT, forward_kl=1.0),
        row(arm=DENSE, forward_kl=0.5),
        row(arm=arm, forward_kl=0.6),
        row(seed=1, arm=SFT, forward_kl=2.0),
        row(seed=1, arm=DENSE, forward_kl=1.0),
        row(seed=1, arm=arm, forward_kl=1.1),
        row(seed=2, arm=arm, forward_kl=0.1),  # nothing to compare with
        row(start="cold", arm=arm, forward_kl=0.1),
    ]
    found = {(mean["start"], mean["label"]): mean for mean in summarise(rows)}
    assert found["warm", arm.label]["share"] == pytest.approx((0.8 + 0.9) / 2)
    assert found["warm", arm.label]["forward_kl"] == pytest.approx((0.6 + 1.1 + 0.1) / 3)
    assert found["warm", arm.label]["seeds"] == 3
    assert found["warm", SFT.label]["share"] == 0
    assert found["warm", DENSE.label]["share"] == 1
    assert found["cold", arm.label]["share"] is None


def test_the_settings_of_an_arm_reach_the_objective():
    found = objective_of(cached(8, 2, settings="positions=tip:0.5 kd_schedule=wsd head_weight=2"))
    assert (found.positions, found.kd_schedule, found.head_weight) == ("tip:0.5", "wsd", 2.0)
    for arm in (*arms_of("knobs", 1), *arms_of("weights", 1)):
        if arm.targets == "cached":
            assert objective_of(arm).kd_weight == arm.kd_weight


def test_matched_losses_pull_alike():
    assert matched(0.5) == 0.6
    assert matched(0.5, "todi") == 0.5
    assert matched(0.3, "skew_forward_kl") == pytest.approx(0.442, abs=1e-3)  # odds of 0.3 / 0.7 times 1.5 / 0.81


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_by_bin():
    confidence = torch.tensor([0.95, 0.97, 0.10, 0.12, 1.0])
    right = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])
    expected = (abs(0.95 + 0.97 + 1.0 - 2) + abs(0.10 + 0.12)) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_batches_repeat_no_sequence_within_an_epoch_and_follow_the_order():
    taken = batches(10, 3, seed=4)
    first = [next(taken) for _ in range(3)]
    assert [index for batch in first for index in batch] == list(ShuffledOrder(10, 4))[:9]
    assert next(taken) != first[0]


def test_renormalised_targets_give_the_divergence_from_a_softmax_over_the_top_k():
    logits = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = sparsify(logits[0], 4)
    found = sparse_divergence(logits[1], renormalised(targets), "forward_kl", tail="bucket")
    p, q = targets.logprobs.log_softmax(-1), logits[1].log_softmax(-1).gather(-1, targets.ids)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1))


def test_random_draws_follow_the_teacher(world, tmp_path):
    cache = study._captured(world, tmp_path, "heldout", VOCAB // 2)
    sequences, num_bytes = random_draws(cache, lambda batch: study._teacher_logits(world, batch), 200, seed=0)
    kept, drawn = cache[0].targets, sequences[0].targets
    best = (drawn.ids == kept.ids[:, :1]).mean(axis=1)
    assert np.abs(best - np.exp(kept.logprobs[:, 0])).max() < 5 * np.sqrt(0.25 / 200)
    assert 0 < num_bytes < 2.2 * 200


def test_bytes_of_draws_count_distinct_ids_and_their_frequencies():
    once = np.arange(400, dtype=np.uint32)[:, None] * 97 % 4096
    assert bytes_of_draws(once.repeat(50, axis=1)) == pytest.approx(bytes_of_draws(once), abs=0.2)
    random = np.sort(np.random.default_rng(0).integers(0, 4096, (400, 50)), axis=1).astype(np.uint32)
    assert bytes_of_draws(random) > 10 * bytes_of_draws(once)


def test_rows_are_written_as_measured_and_not_measured_again(world, tmp_path, monkeypatch):
    rows = study._measured(ARMS, world, tmp_path)
    assert all(0 < float(r["forward_kl"]) < 20 and 0 <= float(r["calibration_error"]) <= 1 for r in rows)
    sampled, bucket, none = (float(r["bytes_per_target"]) for r in rows[2:5])
    assert sampled > bucket > none > 8
    monkeypatch.setattr(study, "measure", None)
    again = study._measured(ARMS, world, tmp_path)
    assert [{k: str(v) for k, v in r.items()} for r in rows] == again
    table = write_report(again, tmp_path / "report", {"steps": 3, "vocab": VOCAB})
    assert "| warm | todi K=8+2 |" in table
    with (tmp_path / "report.csv").open(newline="") as opened:
        assert list(csv.DictReader(opened)) == again
    picture = (tmp_path / "report.svg").read_text()
    for name in ("SFT", "todi dense", "ToDi, 2 samples", "ToDi, bucket", "forward_kl top 8 renormalised"):
        assert picture.count(f">{name}<") == 1, name
    assert "no tail" not in picture  # whose arm is at another temperature


def test_the_same_arm_gives_the_same_row_twice(world, tmp_path):
    first, second = (study.measure(cached(8, 2), world, tmp_path) for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}
