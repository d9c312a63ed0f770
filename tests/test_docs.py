"""The README files: their Python examples run, their commands parse, and their links exist."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from support.tiny_models import save_llama

from cache_tools.__main__ import cli as cache_cli
from todi_offline import capture
from todi_offline.commands.cli import cli
from todi_offline.data.stdlib_corpus import stdlib_pairs

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/**/README.md"))]
READMES = [path for path in READMES if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
COMMANDS = {"todi": cli, "todi-cache": cache_cli}
LAUNCHER = re.compile(r"^(torchrun|accelerate launch) .*?-m todi_offline ")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def shell_lines() -> list[str]:
    lines = [line for path in READMES for block in blocks(path, "bash") for line in block.splitlines()]
    return [LAUNCHER.sub("todi ", line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student and data sets of the names that the examples use."""
    root = tmp_path_factory.mktemp("docs")
    (root / "cache").mkdir()
    save_llama(root / "teacher", num_hidden_layers=2)
    save_llama(root / "student", num_hidden_layers=1)
    rows = [
        json.dumps({"instruction": pair.instruction[-60:], "output": pair.response[:80]})
        for _, pair in zip(range(12), stdlib_pairs(), strict=False)
    ]
    for name, start, stop in (("instructions", 0, 6), ("more", 4, 9), ("all", 0, 12), ("some", 2, 5)):
        (root / f"{name}.jsonl").write_text("\n".join(rows[start:stop]) + "\n")
    return root


@pytest.mark.parametrize("readme", [path for path in READMES if blocks(path, "python")], ids=name_of)
def test_the_python_examples_run_from_the_first_to_the_last(
    readme: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if readme != ROOT / "README.md" and not Path("cache/cache.json").exists():  # that page makes it itself
        capture("teacher/", "instructions.jsonl", "cache/")
    names: dict[str, object] = {}
    for block in blocks(readme, "python"):
        short = block.replace("max_steps=500", "max_steps=2").replace('"run3/")', '"run3/", max_steps=2)')
        short = short.replace('data="some.jsonl")', 'data="some.jsonl", max_steps=2)')
        exec(compile(short, name_of(readme), "exec"), names)


@pytest.mark.parametrize("line", shell_lines())
def test_the_commands_have_these_options(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, name, *arguments = shlex.split(line, comments=True)
    context = click.Context(COMMANDS[program], info_name=program)
    command = COMMANDS[program].get_command(context, name)
    assert command is not None, name
    command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_links_lead_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (readme.parent / link).exists()] == []


def test_the_first_page_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for program, group in COMMANDS.items():
        for name in group.list_commands(click.Context(group)):
            assert f"`{program} {name}" in text, (program, name)
