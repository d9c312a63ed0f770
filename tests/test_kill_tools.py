"""append, merge, subset and import survive kill -9 at any moment, resume, and end with the same bytes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.composing import capture_into, key_of
from support.damage import contents_of
from support.fake_cache import settings, write_cache
from support.kills import CHOSEN, OPERATIONS, STRETCH

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.export import export_cache
from todi_offline.cache.reader import open_cache
from todi_offline.errors import CacheFormatError, CacheIncompleteError


class Program:
    """The program of `kills.py`, and the caches that its operations read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        capture_into(folder / "a", range(8), CHOSEN, stretch=STRETCH)
        capture_into(folder / "b", range(5, 14), CHOSEN, stretch=STRETCH)
        write_cache(folder / "large", num_shards=2, per_shard=50, codec="fast")
        export_cache(open_cache(folder / "large"), folder / "large.parquet")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )

    def begin(self, name: str, out: Path) -> None:
        """Put there what the operation finds: append a finished cache, the others nothing."""
        if name == "append":
            shutil.copytree(self.folder / "a", out)

    def run(self, name: str, out: Path, at: int = 0) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        run = {"name": name, "folder": str(self.folder), "out": str(out), "at": at}
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    found = Program(tmp_path_factory.mktemp("kills"))
    yield found
    found.close()


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_killed_at_any_moment_resumes_and_ends_with_the_same_bytes(
    program: Program, tmp_path: Path, name: str, count: int
) -> None:
    program.begin(name, tmp_path / "whole")
    undisturbed = program.run(name, tmp_path / "whole")
    assert undisturbed["code"] == 0
    whole, inputs = contents_of(tmp_path / "whole"), contents_of(program.folder)
    instants = np.random.default_rng(count).integers(1, undisturbed["operations"] + 1, count).tolist()
    for at in instants:
        out = tmp_path / str(at)
        shutil.rmtree(out, ignore_errors=True)
        program.begin(name, out)
        assert program.run(name, out, at)["code"] == -9
        assert_opens_as_before_or_after(name, out, whole)
        assert program.run(name, out)["code"] == 0
        assert contents_of(out) == whole, at
        assert verify_cache(out) == []
    assert contents_of(program.folder) == inputs


def assert_opens_as_before_or_after(name: str, out: Path, whole: dict[str, bytes]) -> None:
    """A finished cache opens at every instant; one that is not finished yet says so."""
    try:
        found = open_cache(out)
    except (CacheIncompleteError, CacheFormatError):
        assert name != "append"
        return
    if (out / "cache.json").read_bytes() != whole["cache.json"]:
        assert name == "append"
        assert list(found.content_keys) == [key_of(number) for number in range(8)]
    for sequence in found:
        assert len(sequence.targets)


def test_all_operations_are_of_several_shards(program: Program, tmp_path: Path) -> None:
    for name in OPERATIONS:
        program.begin(name, tmp_path / name)
        assert program.run(name, tmp_path / name)["code"] == 0
        assert len(list((tmp_path / name / "commits").iterdir())) >= 2
    assert open_cache(tmp_path / "subset").manifest.settings.k == settings().k - 2
