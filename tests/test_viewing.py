"""The page of a student: its predictions beside the teacher's, its runs and its responses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.pages import page_data
from support.tiny_models import llama, save

from todi_offline.cache.reader import Cache
from todi_offline.commands.cli import cli
from todi_offline.errors import ConfigError, DataError
from todi_offline.evaluation import evaluate
from todi_offline.evaluation.viewing import ViewConfig, view
from todi_offline.training.run import train

QUICK = {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(seed=1), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def run(student: Path, cache: Cache, heldout: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student with its own temperature and beta, and its scores in a folder beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(str(student), cache, out, eval_cache=heldout, max_steps=3, temperature=2.0, beta=0.5, **QUICK)
    scores = {"cache": heldout, "data": "stdlib", "limit": 3, "seeds": (1,), "max_new_tokens": 4, "device": "cpu"}
    evaluate(str(out), out=out.parent / "scores", **scores)
    return out


def shown(out: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sections of a page by title, and its token view with its arrays, or an empty dict."""
    values = view(ViewConfig(out=out, device="cpu", **settings)).to_json()
    sections = {section["title"]: section for section in values["sections"]}
    blocks = [block for section in values["sections"] for block in section["blocks"]]
    return sections, next((block for block in blocks if block["kind"] == "tokens"), {})


def test_the_numbers_of_the_page_equal_the_models(student: Path, heldout: Cache, tmp_path: Path) -> None:
    _, block = shown(tmp_path / "page.html", student=str(student), cache=heldout.root)
    first = block["sequences"][0]
    sequence = heldout[first["number"]]
    with torch.no_grad():
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        logprobs = llama(seed=1)(input_ids=ids).logits[0].log_softmax(-1).double().numpy()
    positions = np.flatnonzero(sequence.target_mask)
    labels = sequence.token_ids[positions + 1].astype(np.int64)
    q = logprobs[positions]
    count = first["num_targets"]
    label = q[np.arange(count), labels]
    np.testing.assert_allclose(block["student_nll"][:count], -label, rtol=1e-3)
    expected = 1 / (1 + np.exp(label - sequence.targets.label_logprob))
    np.testing.assert_allclose(block["label_gate"][:count], expected, atol=2e-3)
    kept = np.take_along_axis(q, sequence.targets.ids.astype(np.int64), axis=1)
    tail = np.log1p(-np.exp(kept).sum(1))
    p, p_tail = sequence.targets.logprobs.astype(float), sequence.targets.tail_logsumexp[:, 0].astype(float)
    divergence = (np.exp(p) * (p - kept)).sum(1) + np.exp(p_tail) * (p_tail - tail)
    np.testing.assert_allclose(block["forward_kl"][:count], divergence, rtol=4e-3, atol=1e-4)


def test_the_worst_sequences_come_first(student: Path, heldout: Cache, tmp_path: Path) -> None:
    _, block = shown(tmp_path / "page.html", student=str(student), cache=heldout.root)
    ends = np.cumsum([item["num_targets"] for item in block["sequences"]])
    means = [part.mean() for part in np.split(np.array(block["forward_kl"]), ends[:-1])]
    assert means == sorted(means, reverse=True)
    assert len(means) == len(heldout)


def test_a_run_is_shown_at_its_own_temperature_and_beta(run: Path, heldout: Cache, tmp_path: Path) -> None:
    _, block = shown(tmp_path / "page.html", student=str(run), cache=heldout.root)
    assert (block["temperature"], block["beta"]) == (2.0, 0.5)
    _, block = shown(tmp_path / "page.html", student=str(run), cache=heldout.root, temperature=1.0, beta=1.0)
    assert (block["temperature"], block["beta"]) == (1.0, 1.0)


def test_curves_before_and_after_and_texts_are_shown(run: Path, tmp_path: Path) -> None:
    sections, _ = shown(tmp_path / "page.html", run=(run, run), scores=(run.parent / "scores",))
    table, *charts = sections["Training"]["blocks"]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    before, after = (row for row in log if "eval_loss" in row)
    assert (before["step"], after["step"]) == (0, 3)
    row = next(row for row in table["rows"] if row[0].startswith("Forward KL"))
    assert row[1:] == [before["eval_forward_kl"], after["eval_forward_kl"]]
    loss = next(chart for chart in charts if chart["title"] == "Loss")
    assert [line["name"] for line in loss["series"]] == ["run", "run, held out"] * 2
    assert loss["series"][0]["x"] == [1, 2, 3]
    metrics = json.loads((run.parent / "scores" / "metrics.json").read_text())
    distance = sections["Distance to the teacher"]["blocks"]
    assert distance[0]["rows"][0][1] == metrics["distance"]["overall"]["measures"]["forward_kl"]["mean"]
    assert any("by position" in block.get("title", "") for block in distance)
    prompt, columns = sections["What they write"]["blocks"][0]["rows"][0]
    assert "assistant" in prompt
    assert [name for name, _ in columns] == ["reference", "scores"]


def test_two_runs_of_the_same_name_are_labelled_by_their_folders(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "again" / "run"
    shutil.copytree(run, other)
    sections, _ = shown(tmp_path / "page.html", run=(run, other))
    loss = next(block for block in sections["Training"]["blocks"] if block.get("title") == "Loss")
    assert [line["name"] for line in loss["series"]][::2] == [str(run), str(other)]


def test_the_same_student_gives_the_same_bytes(student: Path, heldout: Cache, tmp_path: Path) -> None:
    for name in ("a", "b"):
        view(ViewConfig(out=tmp_path / name, student=str(student), cache=heldout.root, device="cpu"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_command_writes_the_page_and_its_numbers(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["view", "--run", str(run), "--out", str(out), "--json"]
    printed = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == page_data(out.read_text())[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to show; name a student and a cache"),
        ({"student": "s"}, "--cache is missing: a student needs a cache to read"),
        ({"cache": "c"}, "--student is missing"),
    ],
)
def test_settings_with_nothing_to_show_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewConfig(out=Path("page.html"), **settings)


def test_folders_without_a_run_or_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*trainer_state.json: .*name the folder that `todi train --out`"):
        shown(tmp_path / "page.html", run=(tmp_path,))
    (tmp_path / "trainer_state.json").write_text('{"log_history": 3}')
    with pytest.raises(DataError, match="holds no log"):
        shown(tmp_path / "page.html", run=(tmp_path,))
    (tmp_path / "metrics.json").write_text("[1, ")
    with pytest.raises(DataError, match=r"cannot read .*metrics.json: .*`todi evaluate --out`"):
        shown(tmp_path / "page.html", scores=(tmp_path,))
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no scores"):
        shown(tmp_path / "page.html", scores=(tmp_path,))
