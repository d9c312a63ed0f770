"""The folder of a run: the same command resumes, different settings are refused, a new start leaves no old files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import llama, save
from support.tiny_runs import trainer_of
from torch import nn
from transformers import TrainerCallback

import todi_offline.training.run
from todi_offline.cache.reader import Cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import CacheLockedError, ConfigError, DivergedError, OutOfMemoryError
from todi_offline.teacher.in_transformers import as_teacher
from todi_offline.training.folder import find_start, how_to_go_on
from todi_offline.training.run import TrainSummary, train

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 5,
}


class Stop(TrainerCallback):
    """Raises after some steps, like a kill, except that Python still cleans up."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after = after
        self.error = error

    def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
        if state.global_step == self.after:
            raise self.error


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama(seed=1), tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="module")
def whole(student: str, cache: Cache, heldout: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(student, cache.root, out, eval_cache=heldout.root, **SETTINGS)
    return out


def killed(student: Any, cache: Any, out: Path, after: int = 3, **settings: Any) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        train(student, cache, out, callbacks=[Stop(after, RuntimeError("killed"))], **(SETTINGS | settings))


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "todi_run.json").read_text())
    return values


def test_the_same_command_resumes_after_a_kill_and_ends_with_the_same_weights(
    student: str, cache: Cache, heldout: Cache, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed(student, cache.root, out, eval_cache=heldout.root)
    assert "summary" not in record(out)
    (out / "checkpoint-4").mkdir()  # half written
    summary = train(student, cache.root, out, eval_cache=heldout.root, **SETTINGS)
    assert (summary.num_steps, weights(out)) == (5, weights(whole))
    assert checkpoints(out) == checkpoints(whole) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5]
    expected = record(whole)["summary"]
    for name in ("before", "after"):
        assert getattr(summary, name)["forward_kl"] == expected[name]["forward_kl"]


def test_a_finished_run_logs_that_and_does_nothing(
    student: str, cache: Cache, heldout: Cache, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for resume in (None, True):
        again = train(student, cache, out, eval_cache=heldout, resume=resume, **SETTINGS)
        assert again == TrainSummary(**record(whole)["summary"])
    assert caplog.text.count("run is finished, after 5 steps") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files


def test_different_settings_are_refused_with_three_solutions_before_the_student_is_loaded(
    student: str, cache: Cache, heldout: Cache, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(student, cache, tmp_path / "run")
    monkeypatch.setattr(todi_offline.training.run, "load_model", lambda *_, **__: pytest.fail("loaded"))
    solutions = r"; name another folder \(--out\), resume it with the new settings \(--resume\), or delete its checkp"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"learning_rate": 0.1}, r"trainer.learning_rate: 0.1 now, 0.01 in that run"),
        ({"beta": 2.0}, r"distillation.beta: 2.0 now, 1.0 in that run"),
        ({"per_device_train_batch_size": 2}, r"sequences_a_step: 2 now, 4 in that run"),
        ({"seed": 1}, r"trainer.seed: 1 now, None in that run"),
    ]
    for change, message in changes:
        expected = rf"holds the checkpoints of a run with other settings \({message}\){solutions}"
        with pytest.raises(ConfigError, match=expected):
            train(student, cache, tmp_path / "run", **(SETTINGS | change))
    with pytest.raises(ConfigError, match=rf"of a run with other settings \(cache_content: .*\){solutions}"):
        train(student, heldout, tmp_path / "run", **SETTINGS)
    with pytest.raises(ConfigError, match=rf"holds a finished run with other settings \(.*beta.*\){solutions}"):
        train(student, cache, whole, eval_cache=heldout, beta=2.0, **SETTINGS)


def test_different_targets_make_a_different_run(
    student: str, cache: Cache, examples: Examples, whole: Path, tmp_path: Path
) -> None:
    """Another teacher of the same data, or less of the same one: a finished run is not taken for theirs."""
    settings = {"k": 16, "tail_samples": 4, "encoding": "f16", "shard_tokens": 4096, "codec": "compact"}
    kinds: list[tuple[int, dict[str, Any], str]] = [
        (7, {}, r"cache_targets\.teacher\.weights: not the same"),
        (0, {"k": 8}, r"cache_targets\.k: 8 now, 16 in that run"),
    ]
    killed(student, cache, tmp_path / "run")
    for number, (seed, change, message) in enumerate(kinds):
        capture(as_teacher(llama(seed), tiny_tokenizer()), examples, tmp_path / str(number), **(settings | change))
        for out in (tmp_path / "run", whole):
            with pytest.raises(ConfigError, match=message):
                train(student, tmp_path / str(number), out, **SETTINGS)
    capture(as_teacher(llama(), tiny_tokenizer()), examples, tmp_path / "same", **settings)  # stored otherwise
    assert train(student, tmp_path / "same", tmp_path / "run", **SETTINGS).num_steps == 5


def test_different_weights_make_a_different_run(student: str, cache: Cache, tmp_path: Path) -> None:
    killed(llama(seed=1), cache, tmp_path / "run", tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"with other settings \(student_weights: not the same\)"):
        train(llama(seed=2), cache, tmp_path / "run", tokenizer=tiny_tokenizer(), **SETTINGS)
    train(student, cache, tmp_path / "run", **SETTINGS)  # the same weights, from their folder


def test_resume_continues_a_run_with_different_settings(student: str, cache: Cache, tmp_path: Path) -> None:
    killed(student, cache, tmp_path / "run")
    summary = train(student, cache, tmp_path / "run", resume=True, **(SETTINGS | {"max_steps": 7}))
    assert summary.num_steps == 7
    more = train(student, cache, tmp_path / "run", resume=True, **(SETTINGS | {"max_steps": 8}))
    assert more.num_steps == 8
    with pytest.raises(ConfigError, match=r"checkpoint-8 cannot be resumed \(sequences_a_step: 8 now, 4 in that"):
        train(student, cache, tmp_path / "run", resume=True, **(SETTINGS | {"gradient_accumulation_steps": 2}))


def test_a_finished_run_is_not_resumed_with_settings_that_leave_no_step(
    student: str, cache: Cache, heldout: Cache, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, planned in (({"beta": 2.0}, 5), ({"max_steps": 4}, 4), ({"max_steps": -1, "num_train_epochs": 0.1}, 1)):
        with pytest.raises(
            ConfigError, match=f"checkpoint-5 is already at step 5 and the new settings end at step {planned}, so no"
        ) as raised:
            train(student, cache, out, eval_cache=heldout, resume=True, **(SETTINGS | change))
        assert all(way in str(raised.value) for way in ("--max-steps", "--epochs", "--out", "--no-resume"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"num_train_epochs": 2.0}, {"num_train_epochs": 0.7}])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_planned_steps_are_those_of_the_trainer(
    settings: dict[str, Any], accumulation: int, cache: Cache, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, cache, gradient_accumulation_steps=accumulation, **settings)
    planned = trainer.num_planned_steps()
    trainer.train()
    assert planned == trainer.state.max_steps == trainer.state.global_step


def test_a_second_run_in_a_folder_is_refused_and_names_the_first(student: str, cache: Cache, tmp_path: Path) -> None:
    out, refusals = tmp_path / "run", []

    class Second(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            for resume in (None, False):
                with pytest.raises(CacheLockedError) as raised:
                    train(student, cache, out, resume=resume, **SETTINGS)
                refusals.append(str(raised.value))

    train(student, cache, out, callbacks=[Second()], **(SETTINGS | {"max_steps": 1}))
    message = f"{out} is being written by process {os.getpid()} on {socket.gethostname()}; wait for it, or stop it"
    assert refusals == [message, message]
    assert not (out / ".lock").exists()


def test_a_killed_run_does_not_block_the_next(student: str, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    code = (
        "import os, signal, sys; from pathlib import Path; from todi_offline.cache.store.locks import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == -signal.SIGKILL
    assert (out / ".lock").exists()
    assert train(student, cache, out, **(SETTINGS | {"max_steps": 1})).num_steps == 1
    assert not (out / ".lock").exists()


def test_a_resumed_run_may_split_its_steps_differently(student: str, cache: Cache, whole: Path, tmp_path: Path) -> None:
    killed(student, cache, tmp_path / "run")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(student, cache, tmp_path / "run", **(SETTINGS | split)).num_steps == 5


def test_where_incomplete_batches_are_dropped_a_resumed_run_keeps_its_batches(
    student: str, cache: Cache, tmp_path: Path
) -> None:
    """An epoch of other batches has another number of steps, and drops other sequences."""
    killed(student, cache, tmp_path / "run", dataloader_drop_last=True)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    with pytest.raises(ConfigError, match=r"cannot be resumed \(sequences_a_batch: 2 now, 4 in that run\)"):
        train(student, cache, tmp_path / "run", resume=True, **(SETTINGS | split))


def test_a_new_start_deletes_the_checkpoints_and_curves_of_the_previous_run(
    student: str, cache: Cache, heldout: Cache, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed(student, cache, out, after=5, seed=3, report_to="tensorboard")
    (out / "notes.txt").write_text("mine")
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    train(student, cache, out, eval_cache=heldout, resume=False, **(SETTINGS | {"save_steps": 3}))
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-5"]
    assert weights(out) == weights(whole)
    assert not list((out / "runs").iterdir())
    assert (out / "notes.txt").read_text() == "mine"


def test_checkpoints_of_another_program_are_neither_resumed_nor_deleted(
    student: str, cache: Cache, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "todi_run.json").unlink()
    with pytest.raises(ConfigError, match=r"holds the checkpoints of a run without todi_run\.json: its"):
        train(student, cache, out, **SETTINGS)
    with pytest.raises(ConfigError, match=r"checkpoint-5 is in a folder without todi_run.json: .*not deleted; name"):
        train(student, cache, out, resume=False, **SETTINGS)
    assert train(student, cache, out, resume=True, **(SETTINGS | {"max_steps": 6})).num_steps == 6


def test_a_run_without_a_checkpoint_starts_again_with_any_settings(student: str, cache: Cache, tmp_path: Path) -> None:
    killed(student, cache, tmp_path / "run", after=1)
    train(student, cache, tmp_path / "run", **(SETTINGS | {"max_steps": 1, "learning_rate": 0.1}))
    with pytest.raises(ConfigError, match="holds no checkpoint to resume; leave out resume"):
        train(student, cache, tmp_path / "other", resume=True, **SETTINGS)


def test_a_checkpoint_of_a_model_alone_is_not_resumed(student: str, cache: Cache, tmp_path: Path) -> None:
    """The schedule of the learning rate would start again in the middle of the run."""
    killed(student, cache, tmp_path / "run", save_only_model=True)
    for resume in (None, True):
        with pytest.raises(ConfigError, match=r"checkpoint-2 holds a model alone .*--no-resume.*another folder"):
            train(student, cache, tmp_path / "run", resume=resume, save_only_model=True, **SETTINGS)
    assert how_to_go_on(tmp_path / "run").endswith("so the run cannot be resumed")
    assert train(student, cache, tmp_path / "run", resume=False, save_only_model=True, **SETTINGS).num_steps == 5
    again = train(student, cache, tmp_path / "run", save_only_model=True, **SETTINGS)
    assert again.num_steps == 5


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file; name a folder for the run \(--out\)"):
        find_start(tmp_path / "file", {}, None)


@pytest.mark.parametrize(
    ("after", "message"),
    [(3, "stopped at step 3; the same command resumes from .*run/checkpoint-2"), (1, "there is no checkpoint yet")],
)
def test_an_interrupt_is_a_warning_that_says_how_to_resume(
    after: int, message: str, student: str, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(student, cache, tmp_path / "run", callbacks=[Stop(after, KeyboardInterrupt())], **SETTINGS)
    assert caplog.records[-1].levelname == "WARNING"
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        train(student, cache, tmp_path / "run", callbacks=[Stop(after + 1, KeyboardInterrupt())], **SETTINGS)
    assert "same command" in caplog.text


def test_running_out_of_memory_is_one_line_with_the_settings_to_lower(
    student: str, cache: Cache, tmp_path: Path
) -> None:
    gone = Stop(3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it."))
    with pytest.raises(OutOfMemoryError, match=r"2.00 GiB.; lower per_device_train_batch_size .*and raise") as error:
        train(student, cache, tmp_path / "run", callbacks=[gone], **SETTINGS)
    assert "\n" not in str(error.value)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(student, cache, tmp_path / "run", **(SETTINGS | split)).num_steps == 5  # as the line says


def test_a_run_that_diverged_saves_no_student(student: str, cache: Cache, tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_step_end(self, _: Any, __: Any, ___: Any, model: nn.Module, **____: Any) -> None:
            nn.init.constant_(model.lm_head.weight, float("nan"))

    with pytest.raises(DivergedError, match="the loss of step 2 is not a finite number"):
        train(student, cache, tmp_path / "run", callbacks=[Spoil()], **SETTINGS)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_records_of_a_run_hold_no_secrets(student: str, cache: Cache, tmp_path: Path) -> None:
    train(student, cache, tmp_path, hub_token="hf_secret", **SETTINGS)
    for name in ("todi_config.json", "todi_run.json"):
        text = (tmp_path / name).read_text()
        assert "hf_secret" not in text
        assert '"hub_token": "<HUB_TOKEN>"' in text


def squares(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (teacher.exp() - student.exp()).square().sum(-1)


def test_a_custom_divergence_is_trained_on_and_recorded_by_name(student: str, cache: Cache, tmp_path: Path) -> None:
    passed = train(student, cache, tmp_path / "a", divergence=squares, **SETTINGS)
    assert json.loads((tmp_path / "a" / "todi_config.json").read_text())["distillation"]["divergence"] == (
        "test_runs:squares"
    )
    named = train(student, cache, tmp_path / "b", divergence="test_runs:squares", **SETTINGS)
    assert named.train_loss == passed.train_loss
    with pytest.raises(ConfigError, match="the divergence <lambda> returns"):
        train(student, cache, tmp_path / "c", divergence=lambda p, q: p - q, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_command_killed_at_any_moment_resumes(
    number: signal.Signals, student: str, cache: Cache, tmp_path: Path
) -> None:
    """The command is killed a little later each time, until it finishes."""
    options = ["--batch-size", "4", "--learning-rate", "0.01", "--max-steps", "60", "--set", "use_cpu=true"]
    command = [
        sys.executable,
        "-c",
        "from todi_offline.commands.cli import main; main()",
        "train",
        "--student",
        student,
    ]
    command += ["--cache", str(cache.root), *options, "--set", "save_steps=5"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True)
    for attempt in range(20):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 8 + attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert "Traceback" not in errors
        if number == signal.SIGINT and "stopped at" in errors:
            assert "same command" in errors
    assert process.returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
