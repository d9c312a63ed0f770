"""`--engine vllm`, with a fake engine: a whole capture, and refused settings."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.fake_vllm import EngineDeadError, FakeLLM, install_fake_vllm
from support.tiny_models import save_llama

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache
from todi_offline.capturing import CaptureConfig, capture
from todi_offline.capturing.vllm_engine import VllmEngine
from todi_offline.commands.cli import cli
from todi_offline.config import load_config
from todi_offline.data import Examples
from todi_offline.errors import CacheMismatchError, ConfigError, EngineError, ModelError
from todi_offline.teacher.in_transformers import Teacher

SMALL: dict[str, Any] = {"k": 8, "tail_samples": 2, "shard_tokens": 4096, "codec": "fast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("teacher"))


def test_a_capture_equals_that_of_transformers_and_records_the_engine(
    folder: Path, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_fake_vllm(monkeypatch)
    made = capture(folder, examples, tmp_path / "a", engine="vllm", engine_set={"enforce_eager": True}, **SMALL)
    assert made.num_captured_targets == made.num_targets
    plain = capture(folder, examples, tmp_path / "b", device="cpu", **SMALL)
    assert made.mean_topk_mass == pytest.approx(plain.mean_topk_mass, abs=1e-4)
    assert verify_cache(tmp_path / "a") == []
    manifests = [open_cache(tmp_path / name).manifest for name in "ab"]
    assert manifests[0].teacher == manifests[1].teacher
    assert manifests[0].parts[0].recipe["engine"] == {"name": "vllm", "version": "0.32", "dtype": "float32"}
    assert manifests[0].parts[0].versions["vllm"] == "0.32.0"
    assert log == ["[('dtype', 'float32'), ('enforce_eager', True), ('trust_remote_code', False)]", "shut down"]


def test_a_capture_resumes_with_the_engine_that_began_it(
    folder: Path, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(monkeypatch)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(folder, examples, tmp_path / "a", engine="vllm", progress=stop, **SMALL)
    with pytest.raises(CacheMismatchError, match="is not finished"):
        capture(folder, examples, tmp_path / "a", device="cpu", **SMALL)
    assert capture(folder, examples, tmp_path / "a", engine="vllm", **SMALL).num_sequences == len(examples)


def test_an_engine_that_dies_as_examples_are_tried_one_by_one_leaves_none_of_them_out(
    folder: Path, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def enqueue(self: FakeLLM, prompts: Any, params: Any, *, use_tqdm: bool) -> None:
        calls.append(len(prompts))
        raise EngineDeadError if len(calls) > 2 else ValueError("a prompt that is refused")

    install_fake_vllm(monkeypatch, enqueue=enqueue)
    with pytest.raises(EngineError, match="vLLM died when asked to"):
        capture(folder, examples, tmp_path, engine="vllm", skip_failed=True, **SMALL)
    assert calls == [21, 1, 1]


def test_a_teacher_that_is_loaded_here_is_refused(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the teacher"):
        capture(teacher, examples, tmp_path, engine="vllm", **SMALL)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device_map": "auto"}, "--device-map .* tensor_parallel_size"),
        ({"attention": "sdpa"}, "--attention .* attention_backend"),
        ({"adapter": "lora/"}, "merge the adapter"),
        ({"device": "cuda:1"}, "--device does not work with"),
        ({"teacher": "a.gguf"}, "does not read GGUF"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_vllm_would_ignore_are_refused(settings: dict[str, str], text: str) -> None:
    config = load_config(CaptureConfig, None, {"teacher": "t", "out": "o", "engine": "vllm"} | settings)
    with pytest.raises(ConfigError, match=text):
        VllmEngine.start(config.teacher, config.engine)


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config(CaptureConfig, None, {"teacher": "t", "out": "o", "engine": "vllm"})
    with pytest.raises(ConfigError, match="--ray-actors"):
        VllmEngine.start(config.teacher, config.engine)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"engine_timeout": 0}, "above 0"),
        ({"engine_set": {"enforce_eager": True}}, "--engine-set enforce_eager is for --engine vllm"),
        ({"engine": "vllm", "engine_set": {"dtype": "half"}}, "--dtype decides it"),
        ({"engine": "llama.cpp"}, "expected one of transformers, vllm"),
    ],
    ids=["timeout", "transformers", "dtype", "unknown"],
)
def test_settings_of_the_engine_that_contradict_others_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(CaptureConfig, None, {"teacher": "t", "out": "o"} | settings)


def test_auto_is_the_dtype_of_the_checkpoint_and_one_must_be_named_where_it_has_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(monkeypatch)
    bare = save_llama(tmp_path / "bare")
    text = (bare / "config.json").read_text()
    (bare / "config.json").write_text(text.replace('"dtype": "float32",', ""))
    config = load_config(CaptureConfig, None, {"teacher": bare, "out": "o", "engine": "vllm"})
    with pytest.raises(ModelError, match="--dtype bfloat16"):
        VllmEngine.start(config.teacher, config.engine)


def test_arguments_of_the_engine_are_given_one_by_one_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_fake_vllm(monkeypatch)
    args = ["capture", "--teacher", str(folder), "--out", str(tmp_path / "c"), "--limit", "3", "--k", "8"]
    args += ["--max-length", "64", "--max-prompt-length", "32", "--engine", "vllm"]
    args += ["--engine-set", "tensor_parallel_size=8", "--engine-set", "attention_backend=FLASHINFER"]
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "('attention_backend', 'FLASHINFER')" in log[0]
    assert "('tensor_parallel_size', 8)" in log[0]


def test_an_argument_without_a_value_is_an_error_of_usage() -> None:
    result = CliRunner().invoke(cli, ["capture", "--engine-set", "enforce_eager"])
    assert result.exit_code == 2
    assert "expected NAME=VALUE" in result.output
