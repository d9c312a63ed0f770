"""`todi-cache`: command lines and their output."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.fake_cache import VOCAB, manifest, sequence, settings, write_cache
from support.tools import run

import cache_tools.__main__ as tools
from todi_offline import __version__
from todi_offline.cache.format.names import sequences_key
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheError, TargetsError

COMMANDS = tools.cli.list_commands(None)  # type: ignore[arg-type]


def test_help_lists_the_commands_and_each_has_an_example() -> None:
    text = run("--help").output
    assert set(COMMANDS) == {"inspect", "view", "verify", "repair", "diff", "subset", "merge", "export", "import"}
    for name in COMMANDS:
        assert name in text
        assert f"Example: todi-cache {name} " in run(name, "--help").output


def test_help_and_version_import_no_command() -> None:
    code = (
        "import sys, cache_tools.__main__ as t; t.cli(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(bool({'numpy', 'zarr', 'pyarrow', 'cache_tools.verify'} & sys.modules.keys()))"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], check=False, capture_output=True, text=True)
        assert done.returncode == 0
    assert done.stdout.strip().endswith(__version__)


def test_no_tool_imports_torch() -> None:
    code = (
        "import sys, cache_tools.__main__ as t\n"
        "for name in t.cli.list_commands(None): t.cli.get_command(None, name)\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inspect_shows_the_contents_of_a_cache(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    text = run("inspect", root).output
    assert "24 sequences" in text
    assert "mass of the first k   1: 0." in text
    assert text.count("kept mass 0.") == 3
    assert "kept mass" not in run("inspect", root, "--rows", "0").output
    found = json.loads(run("inspect", root, "--json", "--rows", "3").stdout)
    assert found["sequences"] == 24
    assert list(found["coverage"]) == ["1", "2", "4", "6"]
    assert list(found["coverage"].values()) == sorted(found["coverage"].values())
    assert found["manifest"]["settings"]["k"] == 6
    assert len(found["rows"]) == 3
    assert found["arrays"]["topk_logprobs"] | {"bytes_per_target": 0} == {
        "dtype": "float16",
        "shape": [8192, 6],
        "shard": [4096, 6],
        "chunk": [512, 6],
        "codec": "pcodec",
        "bytes_per_target": 0,
    }
    assert found["arrays"]["target_mask"]["codec"] == "blosc-zstd"
    by_array = sum(array["bytes_per_target"] for array in found["arrays"].values())
    assert by_array < found["bytes_per_target"] < by_array + 20


def test_sample_rows_are_the_same_each_time_and_are_the_teachers_own(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    rows = json.loads(run("inspect", root, "--json", "--rows", "20").stdout)["rows"]
    assert rows == json.loads(run("inspect", root, "--json", "--rows", "20").stdout)["rows"]
    assert len({row["sequence"] for row in rows}) > 8
    for row in rows:
        expected = sequence(int(row["sequence"].removeprefix("fake:")), settings())
        target = int(expected.target_mask[: row["position"]].sum())
        assert expected.target_mask[row["position"]]
        assert row["label"]["id"] == expected.token_ids[row["position"] + 1]
        assert row["label"]["p"] == pytest.approx(np.exp(expected.targets.label_logprob[target]), rel=1e-6)
        assert [entry["id"] for entry in row["top"]] == expected.targets.ids[target, :5].tolist()
        tail = np.exp(row["tail_logsumexp"]["1"])
        assert row["kept_mass"] + tail == pytest.approx(1, abs=0.01)
    every = json.loads(run("inspect", root, "--json", "--rows", "9999").stdout)
    assert len(every["rows"]) == every["targets"]


def test_coverage_is_the_mean_mass_of_the_first_columns(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    rows = np.concatenate([np.exp(sequence(number, settings()).targets.logprobs) for number in range(24)])
    found = json.loads(run("inspect", root, "--json").stdout)["coverage"]
    for k, mass in found.items():
        assert mass == pytest.approx(rows[:, : int(k)].sum(axis=1).mean(), abs=0.02)  # of long sequences, a part


def test_every_command_takes_a_cache_of_samples_alone(tmp_path: Path) -> None:
    root, wide = write_cache(tmp_path / "cache", k=0), write_cache(tmp_path / "wide")
    run("subset", wide, "--k", 0, "--out", tmp_path / "narrow")
    text = run("inspect", root).output
    assert "k = 0, 3 tail samples" in text
    assert "mass of the first k" not in text
    assert text.count("\n    drawn  ") == 3
    assert "\n    top  " not in text
    assert json.loads(run("inspect", root, "--json").stdout)["coverage"] == {}
    assert "mean KL of first to second 0 nats" in run("diff", root, tmp_path / "narrow", code=1).output
    assert "mean KL of first to second" in run("diff", wide, root, code=1).output
    assert "bytes" in run("view", root, "--out", tmp_path / "page.html").output
    run("export", root, "--out", tmp_path / "out.parquet")
    run("import", tmp_path / "out.parquet", "--out", tmp_path / "again")
    assert "0 of them with different targets" in run("diff", root, tmp_path / "again", code=1).output
    for name in ("cache", "narrow", "again"):
        assert "is whole" in run("verify", tmp_path / name).output
    with pytest.raises(TargetsError, match="export it as plain"):
        run("export", root, "--layout", "axolotl", "--out", tmp_path / "axolotl.parquet")


def test_text_is_shown_where_the_cache_has_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"word{number}": number for number in range(VOCAB)}, unk_token="word0"))
    chosen, root = settings(), tmp_path / "cache"
    with CacheWriter(root, manifest(chosen), tokenizer.to_str()) as writer:
        writer.write_shard(0, [sequence(0, chosen)])
        writer.seal()
    row = json.loads(run("inspect", root, "--json", "--rows", "1").stdout)["rows"][0]
    assert all(entry["text"] == f"word{entry['id']}" for entry in [row["label"], *row["top"]])
    assert row["before"]["ids"] == sequence(0, chosen).token_ids[: row["position"] + 1][-12:].tolist()
    assert row["before"]["text"].split() == [f"word{number}" for number in row["before"]["ids"]]
    assert f"{row['label']['id']} 'word{row['label']['id']}'" in run("inspect", root, "--rows", "1").output
    assert f"after {row['before']['text']!r}" in run("inspect", root, "--rows", "1").output
    assert "is whole" in run("verify", root).output


def test_a_broken_tokenizer_is_named_and_the_rest_can_be_seen(tmp_path: Path) -> None:
    chosen, root = settings(), tmp_path / "cache"
    with CacheWriter(root, manifest(chosen), "{}") as writer:
        writer.write_shard(0, [sequence(0, chosen)])
        writer.seal()
    with pytest.raises(CacheError, match=r"tokenizer.json of .* cannot be read: .*; `todi-cache inspect --rows 0`"):
        run("inspect", root)
    assert "teacher NLL" in run("inspect", root, "--rows", "0").output


def test_an_unfinished_cache_is_shown_when_told_to(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits/000001.json").unlink()
    found = json.loads(run("inspect", root, "--json", "--allow-unsealed").stdout)
    assert found["sequences"] == 12
    assert found["arrays"]["token_ids"]["shape"] == [8192]
    assert "the capture has not finished" in run("verify", root, code=1).output


def test_verify_reports_an_intact_cache_or_its_problems(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    assert "is whole: 24 sequences" in run("verify", root).output
    assert json.loads(run("verify", root, "--json").stdout) == []
    (root / "stray").write_text("")
    assert "note: stray: it is not part of the cache" in run("verify", root).output
    (root / sequences_key(0)).unlink()
    text = run("verify", root, code=1).output
    assert f"{sequences_key(0)}: " in text
    assert "`todi-cache repair`" in text
    assert sequences_key(0) in [found["where"] for found in json.loads(run("verify", root, "--json", code=1).stdout)]


def test_errors_are_one_line_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unsealed = str(write_cache(tmp_path / "u", seal=False))
    for args in (
        ("inspect", str(tmp_path)),
        ("inspect", unsealed),
        ("verify", str(tmp_path)),
        ("verify", str(tmp_path / "none")),
    ):
        monkeypatch.setattr(sys, "argv", ["todi-cache", *args])
        with pytest.raises(SystemExit) as stopped:
            tools.main()
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
