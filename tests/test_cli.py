"""`todi`: command lines and their output."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.tiny import tiny_tokenizer
from support.tiny_models import save_llama

from todi_offline.commands.cli import cli, main
from todi_offline.commands.headings import HEADINGS
from todi_offline.commands.options import RARE, ConfigCommand
from todi_offline.data import DataConfig, load_examples


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """Run `todi` as a process would, and return its one line of error."""
    monkeypatch.setattr(sys, "argv", ["todi", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("teacher"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A folder in which the three commands of the README have run."""
    folder = tmp_path_factory.mktemp("workspace")
    common = ("--teacher", teacher, "--max-length", "96", "--max-prompt-length", "40", "--k", "8")
    run("capture", *common, "--limit", "12", "--out", folder / "cache", "--temperature", "1", "--temperature", "2")
    run("capture", *common, "--limit", "4", "--split", "heldout", "--out", folder / "heldout")
    run("student", "--from", teacher, "--layers", "2", "--out", folder / "student")
    return folder


def test_every_command_has_help_with_an_example() -> None:
    for name in cli.commands:
        text = run(name, "--help").output
        assert f"Example: todi {name}" in text


def test_the_example_in_the_help_of_every_command_runs(
    workspace: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Say {word}.", "output": f"{word} " * 5} for word in ("one", "two", "three", "four")]
    for name in ("dolly.jsonl", "dolly-dev.jsonl", "some.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "heldout").symlink_to(workspace / "heldout")
    monkeypatch.chdir(tmp_path)
    quick = {
        "student": ["--layers", "2"],
        "train": ["--max-steps", "2", "--set", "use_cpu=true", "--set", "save_strategy=no"],
        "evaluate": ["--max-new-tokens", "4", "--seed", "1"],
    }
    for name in ("capture", "student", "plan", "train", "evaluate", "view", "keys"):
        text = run(name, "--help").output
        example = text[text.index("Example: todi ") :].splitlines()[0].split()[2:]
        run(*example, *quick.get(name, []))
    assert {"cache", "student", "run", "scores", "run.html", "keys.txt"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", HEADINGS)
def test_the_headings_of_a_help_name_options_that_there_are(name: str) -> None:
    text = run(name, "--help").output
    headings = [*HEADINGS[name], RARE]
    found = re.findall(r"^(\w.*):$", text, re.M)
    assert [heading for heading in headings if heading in found] == found
    listed = " ".join(HEADINGS[name].values()).split()
    assert len(listed) == len(set(listed))
    assert all(text.count(f"\n  {option} ") == 1 for option in re.findall(r"^  (--[\w-]+) ", text, re.M))


def test_the_help_of_train_lists_common_options_first() -> None:
    text = run("train", "--help").output
    names = ("--epochs", "--learning-rate", "--batch-size", "--gradient-accumulation", "--bf16", "--report-to")
    assert all(text.index(name) < text.index("Objective:") for name in names)


def test_the_trainer_s_own_arguments_have_options(workspace: Path, tmp_path: Path) -> None:
    args = ("train", "--student", workspace / "student", "--cache", workspace / "cache", "--out", tmp_path / "run")
    options = ("--batch-size", "2", "--gradient-accumulation", "2", "--epochs", "1", "--bf16", "--seed", "7")
    others = ("--warmup-steps", "1", "--logging-steps", "1", "--save-steps", "2", "--set", "use_cpu=true")
    assert json.loads(run(*args, *options, *others, "--json").stdout)["num_steps"] == 3
    trainer = json.loads((tmp_path / "run" / "todi_config.json").read_text())["trainer"]
    assert (trainer["bf16"], trainer["seed"], trainer["warmup_steps"]) == (True, 7, 1)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_every_option_of_a_config_is_documented() -> None:
    for command in cli.commands.values():
        if isinstance(command, ConfigCommand):
            for option in command.get_params(command.make_context(command.name, [], resilient_parsing=True)):
                assert getattr(option, "help", "x"), option.name


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, todi_offline.commands.cli as c; c.cli(['--help'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_student_names_the_layers_it_kept(teacher: Path, tmp_path: Path) -> None:
    assert "layers 0, 3 of" in run("student", "--from", teacher, "--layers", "2", "--out", tmp_path / "a").output
    assert "layers 0, 1, 3 of" in run("student", "--from", teacher, "--keep", "0,1,3", "--out", tmp_path / "b").output


def test_capture_reports_its_work_and_repeats_none(workspace: Path, teacher: Path) -> None:
    args = ("capture", "--teacher", teacher, "--max-length", "96", "--max-prompt-length", "40", "--k", "8")
    result = run(*args, "--limit", "12", "--out", workspace / "cache", "--json")
    summary = json.loads(result.stdout)
    assert summary["num_sequences"] == 12
    assert summary["num_captured_tokens"] == 0


def test_train_prints_a_table_of_before_and_after(workspace: Path) -> None:
    args = ("train", "--student", workspace / "student", "--cache", workspace / "cache", "--out", workspace / "run")
    options = ("--eval-cache", workspace / "heldout", "--max-steps", "3", "--batch-size", "4", "--set", "use_cpu=true")
    result = run(*args, *options, "--set", "logging_steps=1")
    output = result.stdout
    assert [line.split()[0] for line in result.stderr.splitlines() if re.search(r"\d\.\d{4} ", line)] == list("01233")
    assert re.search(r"forward_kl +\d+\.\d{4} +\d+\.\d{4}", output)
    assert (workspace / "run" / "model.safetensors").exists()
    assert json.loads((workspace / "run" / "todi_config.json").read_text())["trainer"]["max_steps"] == 3


def test_evaluate_prints_the_distance_by_group_and_the_rouge(workspace: Path, tmp_path: Path) -> None:
    args = ("evaluate", "--student", workspace / "student", "--cache", workspace / "heldout", "--data", "stdlib")
    options = ("--limit", "3", "--seed", "1", "--seed", "2", "--max-new-tokens", "4", "--device", "cpu")
    output = run(*args, *options, "--out", tmp_path).stdout
    assert re.search(r"forward KL, lower bound +\d+\.\d{4} +\d+\.\d{4}", output)
    assert re.search(r"position +targets +fwd KL +estimate +rev KL +CE +top-1 +calib\.", output)
    assert re.search(r"^0 +3 .*\n1 to 3 +9 .*\n4 to 15 +36 ", output, re.M)
    assert re.search(r"^3 and more +\d+ +\d+\.\d{3}", output, re.M)
    assert re.search(r"ROUGE-L +\d+\.\d\d\n", output)
    assert max(map(len, output.splitlines())) <= 80
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = json.loads(run(*args, *options, "--json").stdout)
    assert found == {name: metrics[name] for name in ("distance", "generation")}


def test_a_toml_file_is_read_and_the_command_line_wins(workspace: Path, teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "capture.toml"
    file.write_text(f'[teacher]\nteacher = "{teacher}"\n[data]\nlimit = 3\nmax_length = 96\nmax_prompt_length = 40\n')
    result = run("capture", "--config", file, "--limit", "2", "--out", tmp_path / "cache", "--json")
    assert json.loads(result.stdout)["num_sequences"] == 2


def test_errors_are_one_line_with_exit_code_1(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, student = workspace / "cache", workspace / "student"
    train = ("train", "--student", student, "--out", tmp_path / "run")
    assert "is not a cache" in fails(monkeypatch, capsys, *train, "--cache", tmp_path)
    assert "1, 2" in fails(monkeypatch, capsys, *train, "--cache", cache, "--temperature", "4")
    assert "top 8" in fails(monkeypatch, capsys, *train, "--cache", cache, "--k", "9")
    assert "no_such" in fails(monkeypatch, capsys, *train, "--cache", cache, "--set", "no_such=1")
    assert "expected NAME=VALUE" in fails(monkeypatch, capsys, *train, "--cache", cache, "--set", "oops")
    assert "teacher is missing" in fails(monkeypatch, capsys, "capture", "--out", tmp_path / "c")
    assert "nothing to evaluate on" in fails(monkeypatch, capsys, "evaluate", "--student", student)
    missing = fails(monkeypatch, capsys, "capture", "--teacher", tmp_path / "none.gguf", "--out", tmp_path / "c")
    assert "there is no file" in missing


def test_arguments_of_the_chat_template_are_json(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_start|>' +", "'<|im_start|>' + (title or '') +")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    common = ("keys", "--tokenizer", tmp_path / "tokenizer", "--limit", "3", "--out")
    for name, arguments in (("plain", "{}"), ("titled", '{"title": "Dr. "}')):
        run(*common, tmp_path / name, "--chat-template-kwargs", arguments)
    assert (tmp_path / "plain").read_text() != (tmp_path / "titled").read_text()
    (tmp_path / "own.jinja").write_text("{% set title = 'Dr. ' %}" + tokenizer.chat_template)
    run(*common, tmp_path / "given", "--chat-template", tmp_path / "own.jinja")
    assert (tmp_path / "given").read_text() == (tmp_path / "titled").read_text()
    for arguments, message in (("{", "is not valid JSON"), ("[1]", "is not an object")):
        assert message in run(*common, tmp_path / "no", "--chat-template-kwargs", arguments, code=2).output


def test_keys_are_the_content_keys_that_a_cache_of_the_data_has(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", tmp_path / "rows.jsonl", "--tokenizer", tmp_path / "tokenizer", "--limit", 2)
    assert "2 examples" in run("keys", *options, "--out", tmp_path / "keys.txt").output
    expected = load_examples(DataConfig(data=str(tmp_path / "rows.jsonl"), limit=2), tiny_tokenizer())
    assert (tmp_path / "keys.txt").read_text().splitlines() == expected.content_keys().to_hex()
