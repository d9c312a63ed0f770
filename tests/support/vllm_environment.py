"""Runs of this library in a Python environment that has vLLM, outside of the tests' own process."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PYTHON = os.environ.get("TODI_VLLM_PYTHON", "")

START_SECONDS = 500
"""More than an engine needs to start where all cores are busy."""

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.timeout(2 * START_SECONDS + 60),
    pytest.mark.skipif(not PYTHON, reason="TODI_VLLM_PYTHON names no Python that has vLLM"),
]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a run: a small cache of keys and values, and one thread."""
    plain = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | plain | changes


def start(args: Sequence[object], **changes: str) -> "subprocess.Popen[str]":
    """Start a module with arguments."""
    return subprocess.Popen(
        [PYTHON, "-m", *map(str, args)],
        env=environment(**changes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(args: Sequence[object], code: int = 0, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Run a module with arguments to its end, within the time that an engine needs."""
    found = subprocess.run(
        [PYTHON, "-m", *map(str, args)],
        env=environment(**changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found


def run_mode(teacher: Path, options: Mapping[str, Any], **changes: str) -> dict[str, Any]:
    """Return how far the targets of an engine with these options are from those of transformers."""
    found = run(["benchmarks._vllm_mode", teacher, 12, json.dumps(dict(options))], **changes)
    measured: dict[str, Any] = json.loads(found.stdout)
    return measured
