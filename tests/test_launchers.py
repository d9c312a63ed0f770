"""torchrun and accelerate start the ranks of a capture, and torchrun starts them again after a death."""

import json
import socket
import sys
from pathlib import Path

import pytest
from conftest import Row
from support.captures import Setting, example_of, records_of, sums_of
from support.programs import run, started


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, conversations: list[Row]) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"), conversations[:120])


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_the_command_runs_under_a_launcher(setting: Setting, tmp_path: Path, launcher: str) -> None:
    root = tmp_path / "cache"
    done = run([*launched(launcher), "-m", "todi_offline", *setting.words(root)])
    assert done.code == 0, done.errors
    assert len(json.loads(done.output)["workers"]) == 2
    assert sums_of(root) == setting.whole


@pytest.mark.slow
def test_nodes_of_torchrun_share_a_capture(setting: Setting, tmp_path: Path) -> None:
    """As `srun torchrun` starts them: one on each of two nodes, which are both this machine."""
    root, endpoint = tmp_path / "cache", f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    words = [sys.executable, "-m", "torch.distributed.run", *options, "--rdzv-id", "job", "-m", "todi_offline"]
    with started([*words, *setting.words(root)]) as first, started([*words, *setting.words(root)]) as second:
        outputs = [node.communicate(timeout=240)[0] for node in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0)
    (summary,) = filter(None, outputs)  # of the node that has rank 0
    assert len(json.loads(summary)["workers"]) == 2
    assert sums_of(root) == setting.whole


DIES = """\
import os, signal
import todi_offline.capturing.engines as engines
from todi_offline.commands.cli import main
real = engines.queue_targets
def queue_targets(teacher, examples, settings):
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(teacher, examples, settings)
engines.queue_targets = queue_targets
main()
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_of_a_killed_one_again(setting: Setting, tmp_path: Path) -> None:
    root, script = tmp_path / "cache", tmp_path / "dies_once.py"
    script.write_text(DIES.format(when="(os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0')"))
    done = run([*launched("torchrun"), str(script), *setting.words(root)])
    assert done.code == 0, done.errors
    assert sums_of(root) == setting.whole


@pytest.mark.slow
def test_three_restarts_of_torchrun_name_an_example_that_kills_its_rank(setting: Setting, tmp_path: Path) -> None:
    root, script, poison = tmp_path / "cache", tmp_path / "dies.py", example_of(setting.whole_root, 1)
    script.write_text(DIES.format(when=f"{poison!r} in [example.id for example in examples]"))
    words = [*launched("torchrun"), "--max-restarts", "3", str(script), *setting.words(root)]
    done = run(words)
    assert done.code != 0
    (line,) = done.error_lines
    assert line.startswith(f"Error: each worker that read example {poison!r} of shard 1 died"), done.errors
    assert len(records_of(root)) == len(records_of(setting.whole_root)) - 1
    done = run([*words, "--skip-failed"])
    assert done.code == 0, done.errors
    assert json.loads(done.output)["left_out"] == {poison: "each worker that read it died"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launched(launcher: str) -> list[str]:
    words = LAUNCHERS[launcher]
    if launcher == "torchrun":
        return [sys.executable, "-m", *words, "--standalone"]
    return [sys.executable, "-m", *words, "--mixed_precision", "no", "--dynamo_backend", "no"]
