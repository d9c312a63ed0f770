"""`todi-cache`: what a person types, and what comes back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_cache import write_cache

import cache_tools.__main__ as tools


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(tools.cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_help_lists_the_commands_and_each_has_an_example() -> None:
    text = run("--help").output
    for name in ("inspect", "verify"):
        assert name in text
        assert f"Example: todi-cache {name} cache/" in run(name, "--help").output


def test_no_tool_imports_torch() -> None:
    code = "import sys, cache_tools.inspect, cache_tools.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inspect_shows_what_a_cache_holds(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    text = run("inspect", root, "--rows", "2").output
    assert "24 sequences" in text
    assert "mass of the first k   1: 0." in text
    assert text.count("kept mass 0.") == 2
    found = json.loads(run("inspect", root, "--json", "--rows", "3").stdout)
    assert found["sequences"] == 24
    assert list(found["coverage"]) == ["1", "2", "4", "6"]
    assert list(found["coverage"].values()) == sorted(found["coverage"].values())
    assert found["manifest"]["settings"]["k"] == 6
    assert len(found["rows"]) == 3
    by_array = sum(array["bytes_per_target"] for array in found["arrays"].values())
    assert by_array < found["bytes_per_target"] < by_array + 20


def test_verify_says_that_a_cache_is_whole_or_what_is_wrong(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    assert "is whole: 24 sequences" in run("verify", root).output
    assert json.loads(run("verify", root, "--json").stdout) == []
    (root / "stray").write_text("")
    assert "stray: no record names it\n    to mend it: delete it" in run("verify", root, code=1).output
    assert json.loads(run("verify", root, "--json", code=1).stdout)[0]["where"] == "stray"


def test_errors_are_one_line_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (("inspect", str(tmp_path)), ("inspect", str(write_cache(tmp_path / "c")), "--rows", "1", "--text")):
        monkeypatch.setattr(sys, "argv", ["todi-cache", *args])
        with pytest.raises(SystemExit) as stopped:
            tools.main()
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
