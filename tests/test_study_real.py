"""`benchmarks study-real` with a tiny teacher: its files, its arms, its rows and its report."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, llama

from benchmarks import _study_real_world as world
from benchmarks import study_real
from benchmarks._study_arms import DENSE, SFT, Arm, cached
from benchmarks._study_distance import distance, estimates
from benchmarks._study_kept import keep, numbered, open_kept
from benchmarks._study_losses import cached_loss, calibration_error, dense_loss, logits_of
from benchmarks._study_real_report import MEASURES, write_report
from benchmarks._study_real_world import Settings, claimed
from todi_offline.cache.reader import open_cache
from todi_offline.data import Examples
from todi_offline.errors import ConfigError
from todi_offline.training.stream import Collator

ARMS = [*study_real.arms_of(1, ["weights", "knobs", "others"]), study_real.MAIN[-1]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    llama(num_hidden_layers=3).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n % 9 + 3)))} for n in range(24)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Settings(
        teacher=str(folder / "teacher"),
        data=str(folder / "data.jsonl"),
        rows=20,
        heldout_rows=4,
        targets=500,
        warm_targets=200,
        heldout_targets=300,
        layers=2,
        max_length=64,
        batch_sequences=4,
    )


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    world.prepare(settings, folder)
    return folder


@pytest.fixture(scope="module")
def rows(settings, folder):
    study_real.measure_arms(ARMS, settings, folder)
    return study_real.read_rows(folder / "rows.csv")


def test_the_kept_activations_give_the_teachers_logits_at_every_target(settings, folder):
    teacher = world._teacher(settings)
    for split in ("train", "heldout"):
        batch = Collator()(numbered(open_cache(folder / split)))
        with torch.no_grad():
            expected = logits_of(teacher.model, batch, VOCAB)
        torch.testing.assert_close(open_kept(folder / split).logits(batch), expected, atol=1e-4, rtol=1e-4)


def test_an_arm_with_every_id_kept_takes_the_step_of_dense_todi(settings, folder, tmp_path):
    teacher = world._teacher(settings)
    examples = Examples.from_list(world.texts(settings, teacher.tokenizer)["train"][:4])
    keep(teacher, examples, tmp_path / "all", k=VOCAB, tail_samples=0, temperatures=(1.0,))
    cache = open_cache(tmp_path / "all")
    gradients = []
    for sequences, loss in (
        (cache, lambda logits, batch: cached_loss(cached(VOCAB), cache, logits, batch)),
        (numbered(cache), lambda logits, batch: dense_loss(DENSE, open_kept(tmp_path / "all").logits, logits, batch)),
    ):
        batch = Collator()([sequences[index] for index in range(len(cache))])
        logits = torch.randn(len(batch["labels"]), VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss(logits, batch).backward()
        gradients.append(logits.grad)
    assert gradients[1].norm() > 0.01
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()  # f16 rounds the log-probs


def test_narrowed_caches_hold_the_sequences_of_the_capture_in_its_order(folder):
    whole, small = open_cache(folder / "train"), world.narrowed(cached(8, 4, encoding="root8"), folder)
    assert [s.token_ids.tolist() for s in small] == [s.token_ids.tolist() for s in whole]
    assert small[0].targets.ids.shape[1] == 8
    assert small[0].targets.tail_ids.shape[1] == 4


def test_no_text_is_read_by_two_of_warm_start_arms_and_measure(settings):
    texts = world.texts(settings, tiny_tokenizer())
    keys = [{(e.source, e.id) for e in texts[split]} for split in ("warm", "train", "heldout")]
    assert sum(map(len, keys)) == len(set.union(*keys)) == sum(map(len, texts.values()))
    assert {source for source, _ in keys[2]} == {"data.jsonl", "stdlib/heldout"}


def test_each_arm_gives_a_row_once(rows, settings, folder, monkeypatch):
    assert [row["targets"] for row in rows] == [arm.targets for arm in ARMS]
    assert len({(row["forward_kl"], row["cross_entropy"]) for row in rows}) == len(rows)
    assert {row["num_targets"] for row in rows} == {str(open_cache(folder / "train").num_targets.sum())}
    assert all(0 < float(row["forward_kl_se"]) < float(row["forward_kl"]) < 20 for row in rows)
    monkeypatch.setattr(study_real, "measure", None)
    study_real.measure_arms(ARMS, settings, folder)
    assert study_real.read_rows(folder / "rows.csv") == rows


def test_an_arm_that_another_process_has_is_left_to_it(settings, folder, monkeypatch, rows):
    arm = dataclasses.replace(SFT, seed=7)
    monkeypatch.setattr(study_real, "measure", None)
    with claimed(folder / f"{study_real.name_of(arm)}.lock") as free:
        study_real.measure_arms([arm], settings, folder)
    assert free
    assert study_real.read_rows(folder / "rows.csv") == rows


def test_the_report_has_the_finished_arms_and_names_the_others(rows, settings, folder, tmp_path):
    study_real.write_arms([SFT], settings, folder)
    written = study_real.read_rows(folder / "written.csv")
    later = dataclasses.replace(SFT, seed=2)
    write_report([*ARMS, later], rows, written, tmp_path / "real", {"targets": 500})
    table = (tmp_path / "real.md").read_text()
    for arm in ARMS:
        assert f"| warm | {arm.label} |" in table
    assert "- warm SFT, seed 2" in table
    with (tmp_path / "real.csv").open(newline="") as opened:
        found = list(csv.DictReader(opened))
    assert [row["forward_kl"] for row in found] == [row["forward_kl"] for row in rows]
    assert [bool(row["rouge_l_greedy"]) for row in found] == [True] + [False] * (len(ARMS) - 1)
    assert "ToDi, 8 samples, root8" in (tmp_path / "real.svg").read_text()


def test_a_student_that_was_not_kept_is_trained_again_to_write(settings, folder, tmp_path, rows, monkeypatch):
    own = shutil.copytree(folder, tmp_path / "own")
    student = own / "students" / study_real.name_of(DENSE)
    weights = (student / "model.safetensors").read_bytes()
    shutil.rmtree(student)
    monkeypatch.setattr(study_real, "written", lambda *_: {"rouge_l_greedy": 1.0})
    study_real.write_arms([DENSE], settings, own)
    assert (student / "model.safetensors").read_bytes() == weights


def test_shares_are_of_forward_and_of_reverse_kl(tmp_path):
    def row(arm, forward, reverse):
        measures = dict.fromkeys(MEASURES, 0.1) | {"forward_kl": forward, "reverse_kl": reverse}
        errors = {f"{name}_se": 0.01 for name in MEASURES}
        return dataclasses.asdict(arm) | {"num_targets": "9", "bytes_per_target": 50.0} | measures | errors

    arm = cached(16, 8)
    rows = [row(SFT, 3.0, 4.0), row(DENSE, 2.0, 2.0), row(arm, 2.1, 3.0)]
    table = write_report([SFT, DENSE, arm], rows, [], tmp_path / "real", {})
    assert "| 2.1000 (0.0100) | 90.0% | 3.0000 (0.0100) | 50.0% |" in table
    assert "All arms have run." in table


def test_writing_needs_instructions(tmp_path):
    with pytest.raises(ConfigError, match="data=FILE"):
        study_real.run(True, write="yes", work=str(tmp_path))


def test_estimates_are_means_over_targets_and_the_calibration_error():
    generator = np.random.default_rng(0)
    sequences = np.sort(generator.integers(0, 40, 900))
    kl, confidence = generator.random(900) + 0.02 * sequences, generator.random(900)
    right = (generator.random(900) < confidence**2).astype(float)
    found = estimates({"kl": kl, "confidence": confidence, "right": right}, sequences)
    assert found["kl"] == pytest.approx(kl.mean(), abs=1e-5)
    expected = calibration_error(torch.from_numpy(confidence).float(), torch.from_numpy(right).float())
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-4)
    sums = np.bincount(sequences, kl - kl.mean())
    assert found["kl_se"] == pytest.approx(np.sqrt((sums**2).sum()) / 900, rel=0.2)


def test_a_student_that_is_the_teacher_is_at_no_distance(settings, folder):
    teacher = world._teacher(settings).model
    found = distance(teacher, open_cache(folder / "heldout"), open_kept(folder / "heldout"))
    assert abs(found["forward_kl"]) < 1e-5
    assert abs(found["reverse_kl"]) < 1e-5
    assert found["top1_agreement"] == 1


def test_no_two_arms_have_one_name():
    arms = study_real.arms_of(3)
    assert len({study_real.name_of(arm) for arm in arms}) == len(arms)
    assert all(isinstance(arm, Arm) for arm in arms)


def test_groups_of_arms_are_chosen_by_name():
    everything = study_real.arms_of(3)
    assert everything[: len(study_real.MAIN)] == study_real.MAIN
    assert {arm.seed for arm in everything} == {0, 1, 2}
    assert study_real.arms_of(1, ["cold"]) == study_real.COLD
    assert study_real.arms_of(3, ["cold"]) == study_real.COLD
    both = study_real.arms_of(1, ["main", "knobs"])
    assert set(both) == {*study_real.MAIN, *study_real.KNOBS}
    assert len(both) == len(set(both)) < len(study_real.MAIN) + len(study_real.KNOBS)
    with pytest.raises(ConfigError, match="'colt'; expected some of main, cold, others, weights, knobs"):
        study_real.arms_of(1, ["colt"])
