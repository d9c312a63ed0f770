"""`--report-to trackio` writes the curves of a run into trackio's folder."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.tiny_models import save_llama

from todi_offline.cache.reader import Cache

pytestmark = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")


def test_the_curves_of_a_run_are_in_the_folder_of_trackio(cache: Cache, tmp_path: Path) -> None:
    """In a process of its own, for trackio starts a server there."""
    student = save_llama(tmp_path / "student", seed=1)
    options = ("--max-steps", "2", "--batch-size", "4", "--report-to", "trackio", "--set", "use_cpu=true")
    command = [sys.executable, "-m", "todi_offline", "train", "--student", student, "--cache", cache.root]
    logged = ("--set", "logging_steps=1", "--set", "save_strategy=no", "--set", "project=smoke")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, "--out", tmp_path / "run", *options, *logged],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "smoke.db")) as database:
        rows = [str(row) for row in database.execute("select * from metrics")]
    assert len(rows) >= 2
    assert all("train/forward_kl" in row for row in rows[:2])
