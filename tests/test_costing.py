"""`todi plan`, compared with the capture and the training that it predicts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.tiny_models import VOCAB, save_llama

import todi_offline.capturing.loading
from todi_offline.cache.reader import open_cache
from todi_offline.capturing import capture
from todi_offline.capturing.coordinator import CacheWriter
from todi_offline.commands.cli import cli
from todi_offline.costing import Plan, plan
from todi_offline.costing.studied import SHARES, shares_of
from todi_offline.errors import ConfigError, TodiError
from todi_offline.training.run import train

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LENGTHS: dict[str, Any] = {"max_length": 96, "max_prompt_length": 40}
SMALL: dict[str, Any] = {**LENGTHS, "limit": 24, "k": 8, "tail_samples": 4, "encoding": "f16", "shard_tokens": 4096}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("teacher")))


def choice(planned: Plan, k: int, samples: int, encoding: str) -> Any:
    wanted = (k, samples, encoding)
    return next(each for each in planned.choices if (each.k, each.tail_samples, each.encoding) == wanted)


def size_on_disk(folder: Path) -> int:
    return sum(open_cache(str(folder)).bytes_by_array.values())


@pytest.fixture(scope="module")
def small(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    capture(teacher, "stdlib", folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def planned(teacher: str) -> Plan:
    """The plan of the same capture, from a probe of two thirds of its sequences."""
    return plan(teacher, "stdlib", probe=16, **SMALL)


def test_the_amounts_equal_those_of_the_capture(planned: Plan, small: Path) -> None:
    cache = open_cache(str(small))
    amount = planned.amount
    assert (amount.num_sequences, amount.num_shards) == (len(cache), cache.manifest.num_shards)
    assert (amount.num_tokens, amount.num_targets) == (cache.num_tokens.sum(), cache.num_targets.sum())
    assert planned.num_read_sequences == len(cache)
    assert planned.num_known_sequences == 0


def test_the_bytes_equal_those_of_the_capture(planned: Plan, small: Path) -> None:
    asked = next(each for each in planned.choices if each.is_asked)
    assert (asked.k, asked.tail_samples, asked.encoding, asked.basis) == (8, 4, "f16", "probe")
    assert asked.total_bytes == pytest.approx(size_on_disk(small), rel=0.03)
    assert asked.bytes_per_target == pytest.approx(asked.total_bytes / planned.amount.num_targets)
    assert planned.shard_bytes == pytest.approx(asked.total_bytes, abs=1)


@pytest.mark.parametrize(("k", "samples", "encoding"), [(16, 8, "root8"), (64, 0, "f16"), (32, 8, "root8")])
def test_every_row_equals_the_size_of_its_own_capture(
    planned: Plan, teacher: str, tmp_path: Path, k: int, samples: int, encoding: str
) -> None:
    shape = {"k": k, "tail_samples": samples, "encoding": encoding}
    summary = capture(teacher, "stdlib", tmp_path / "cache", **{**SMALL, **shape})
    row = choice(planned, k, samples, encoding)
    assert row.total_bytes == pytest.approx(size_on_disk(tmp_path / "cache"), rel=0.03)
    assert row.kept_mass == pytest.approx(summary.mean_topk_mass, abs=0.02)


def test_the_files_equal_those_of_the_capture(planned: Plan, small: Path) -> None:
    assert planned.num_files == sum(path.is_file() for path in small.rglob("*"))


def test_one_row_is_suggested_by_its_shares_and_its_bytes(planned: Plan) -> None:
    suggested = [each for each in planned.choices if each.is_suggested]
    assert [(each.k, each.tail_samples, each.encoding) for each in suggested] == [(16, 8, "root8")]
    assert planned.suggestion.startswith("--k 16 --tail-samples 8 --encoding root8: the fewest bytes of the shapes")
    assert "its smallest share is 95%" in planned.suggestion


def test_without_a_probe_the_teacher_is_not_loaded(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(todi_offline.capturing.loading, "load_teacher")
    found = plan(teacher, "stdlib", **SMALL)
    assert found.duration is None
    assert found.peak_bytes is None
    assert found.teacher.num_parameters > 0
    row = choice(found, 8, 4, "root8")
    assert row.basis == "study"
    assert row.kept_mass is None
    assert 28.9 < row.bytes_per_target < 45
    unknown = choice(found, 64, 8, "f16")
    assert (unknown.basis, unknown.total_bytes) == ("unknown", None)


def test_a_rate_gives_the_time_and_the_basis(teacher: str) -> None:
    found = plan(teacher, "stdlib", rate=100.0, **SMALL)
    assert found.duration is not None
    assert found.duration.seconds == found.amount.num_tokens / 100
    assert found.duration.basis == "at 100 tokens a second, as given"
    shared = plan(teacher, "stdlib", rate=100.0, ray_actors=4, **SMALL)
    assert shared.duration is not None
    assert shared.duration.seconds == found.duration.seconds / 4


def test_a_probe_gives_the_time_in_proportion_to_the_work(planned: Plan) -> None:
    assert planned.duration is not None
    assert re.fullmatch(r"measured here: 16 sequences, [\d,]+ tokens in \d+\.\d s", planned.duration.basis)
    assert planned.peak_bytes
    assert planned.peak_bytes > planned.weight_bytes


def test_training_takes_the_steps_that_are_planned(teacher: str, small: Path, tmp_path: Path) -> None:
    found = plan(teacher, "stdlib", rate=100.0, student=teacher, epochs=2.0, batch_size=5, **SMALL)
    assert found.student is not None
    trained = train(
        teacher,
        small,
        tmp_path / "run",
        num_train_epochs=2.0,
        per_device_train_batch_size=5,
        use_cpu=True,
        save_strategy="no",
    )
    assert found.student.num_steps == trained.num_steps
    assert found.student.memory_bytes == 16 * found.teacher.num_parameters
    assert found.student.flops == pytest.approx(6 * found.flops)
    assert found.student.duration is not None
    assert found.duration is not None
    assert found.student.duration.seconds == pytest.approx(6 * found.duration.seconds)


@pytest.mark.parametrize("probe", [0, 4])
def test_sequences_in_an_existing_cache_are_not_counted(teacher: str, small: Path, probe: int) -> None:
    same = plan(teacher, "stdlib", out=str(small), probe=probe, **SMALL)
    assert same.num_read_sequences == 0
    assert same.duration is None
    longer = plan(teacher, "stdlib", out=str(small), probe=probe, **{**SMALL, "limit": 30})
    assert (longer.num_known_sequences, longer.num_read_sequences, longer.amount.num_sequences) == (24, 6, 6)
    reusing = plan(teacher, "stdlib", reuse=(str(small),), probe=probe, **{**SMALL, "limit": 30})
    assert (reusing.num_known_sequences, reusing.num_read_sequences, reusing.amount.num_sequences) == (0, 6, 30)


def test_committed_shards_of_a_stopped_capture_are_not_read_again(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "limit": 80}
    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "seal", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            capture(teacher, "stdlib", tmp_path / "cache", **settings)
    left = plan(teacher, "stdlib", out=str(tmp_path / "cache"), **settings)
    assert left.amount.num_shards > 1
    assert left.num_read_sequences == 0
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    left = plan(teacher, "stdlib", out=str(tmp_path / "cache"), **settings)
    summary = capture(teacher, "stdlib", tmp_path / "cache", **settings)
    assert left.num_read_tokens == summary.num_captured_tokens > 0
    assert left.num_read_targets == summary.num_captured_targets


REFUSED: dict[str, dict[str, Any]] = {
    "a k beyond the vocabulary": {"k": VOCAB + 1},
    "nothing to keep": {"k": 0, "tail_samples": 0},
    "samples of no tail": {"k": VOCAB, "tail_samples": 1},
    "no data": {"data": "nowhere.jsonl"},
    "lengths without room": {"max_prompt_length": 96},
    "an example longer than a shard": {"max_length": 8192, "max_prompt_length": 40, "pack": True, "data": "long.jsonl"},
    "another cache": {"out": "small", "k": 9},
    "a cache that holds less": {"reuse": ("small",), "k": 9},
    "a folder of other files": {"out": "foreign"},
    "no teacher": {"teacher": "./nowhere"},
    "an unknown setting": {"kk": 3},
}


@pytest.mark.parametrize("probe", [0, 2])
@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_plan_refuses_the_settings_that_a_capture_refuses(
    teacher: str,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    probe: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(small)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 9000}) + "\n")
    asked = {"teacher": teacher, "data": "stdlib", "out": str(tmp_path / "new"), **SMALL, **settings}
    with pytest.raises(TodiError) as by_capture:
        capture(**asked)
    with pytest.raises(TodiError) as by_plan:
        plan(probe=probe, **asked)
    assert type(by_plan.value) is type(by_capture.value)
    assert str(by_plan.value) == str(by_capture.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {"k": VOCAB, "tail_samples": 0},
        {"k": 0, "tail_samples": 20},
        {"k": 4, "tail_samples": 2, "temperatures": (2.0,), "tail_temperature": 2.0},
        {"k": 8, "tail_samples": 0, "temperatures": (2.0,)},
    ],
    ids=["the whole vocabulary", "samples alone", "another temperature", "no samples"],
)
def test_any_shape_that_can_be_captured_can_be_planned(teacher: str, tmp_path: Path, shape: dict[str, Any]) -> None:
    settings = {**SMALL, **shape, "limit": 12}
    asked = next(row for row in plan(teacher, "stdlib", probe=12, **settings).choices if row.is_asked)
    capture(teacher, "stdlib", tmp_path / "cache", **settings)
    assert asked.total_bytes == pytest.approx(size_on_disk(tmp_path / "cache"), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"probe": -1}, "probe is -1"), ({"rate": 0.0}, "rate is 0.0"), ({"epochs": float("inf")}, "epochs is inf")],
)
def test_numbers_that_make_no_sense_are_refused(teacher: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(teacher, "stdlib", **settings)


def test_the_same_seed_probes_the_same_sequences(teacher: str) -> None:
    settings = {**SMALL, "limit": 12}
    first, again, other = (plan(teacher, "stdlib", probe=3, probe_seed=seed, **settings) for seed in (0, 0, 1))
    assert first.choices == again.choices
    assert first.choices != other.choices


def test_the_shares_equal_those_of_the_studies() -> None:
    columns = ("small_warm", "small_cold")
    found: dict[tuple[int, int], dict[str, float]] = {}
    for line in (RESULTS / "study-choice.md").read_text().splitlines():
        row = re.match(r"\| (warm|cold) \| todi K=(\d+)(?:\+(\d+)| bucket) \| [\d.]+ \| [^|]*\| (-?[\d.]+)%", line)
        if row:
            share = float(row[4]) / 100
            found.setdefault((int(row[2]), int(row[3] or 0)), {})[columns[row[1] == "cold"]] = share
    for shape, shares in SHARES.items():
        expected = {name: getattr(shares, name) for name in columns if getattr(shares, name) is not None}
        assert {name: round(value, 3) for name, value in found[shape].items()} == expected, shape


def test_the_shares_of_a_real_teacher_are_near_those_of_the_study() -> None:
    """Seeds are still added to that study, and two of them differ by up to 8 points."""
    pattern = (
        r"\| warm \| todi K=(\d+)(?:\+(\d+)| bucket)(?: root8)? \| [\d.]+ \| [^|]*\| ([\d.]+)%[^|]*\| [^|]*\| ([\d.]+)%"
    )
    rows = re.findall(pattern, (RESULTS / "study-real.md").read_text())
    assert len(rows) >= 4
    for k, samples, forward, reverse in rows:
        shares = shares_of(int(k), int(samples or 0))
        assert shares.forward_kl == pytest.approx(float(forward) / 100, abs=0.08)
        assert shares.reverse_kl == pytest.approx(float(reverse) / 100, abs=0.08)


def test_the_command_prints_the_plan_and_as_json(teacher: str, tmp_path: Path) -> None:
    config = tmp_path / "capture.toml"
    config.write_text(
        "[data]\nlimit = 24\nmax_length = 96\nmax_prompt_length = 40\n"
        '[cache]\nk = 8\ntail_samples = 4\nencoding = "f16"\n'
    )
    args = ["plan", "--config", str(config), "--teacher", teacher, "--probe", "4", "--student", teacher]
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    output = result.stdout
    assert re.search(r"^sequences +24$", output, re.M)
    assert re.search(r"^8\+4 +f16 +\d+\.\d +[\d.]+ kB +0\.\d{3} +101% +55% +95% +78% +your settings *$", output, re.M)
    assert re.search(r"^16\+8 +root8 .* suggested *$", output, re.M)
    assert re.search(r"^time: 0:00:\d\d \(measured here", output, re.M)
    assert re.search(r"^steps +9$", output, re.M)
    shown = json.loads(CliRunner().invoke(cli, [*args, "--json"], catch_exceptions=False).stdout)
    assert shown["amount"]["num_sequences"] == 24
    assert set(shown) == {field.name for field in dataclasses.fields(Plan)}
    assert np.isclose(sum(each["is_asked"] for each in shown["choices"]), 1)
