"""The passes over logits, eager and compiled; test_fused compares their results with the readable objective."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from todi_offline.losses import passes

COMPILED = """
import torch
from todi_offline.losses import passes

for temperature in (1.0, 2.0, 0.7):
    exponentiate, combine = (torch.compile(f, dynamic=True) for f in (passes.exponentiate_piece, passes.combine_piece))
    power = max(temperature, 1 / temperature)
    for num_targets in (1, 7, 12):
        generator = torch.Generator().manual_seed(num_targets)
        logits = 10 * torch.randn(num_targets, 301, generator=generator)
        logits[:, 5] = -torch.inf
        plain, least, factors = logits.clone(), logits[:, 0].clone(), torch.randn(2, num_targets, generator=generator)
        found = exponentiate(logits, least, max(temperature, 1.0), power)
        torch.testing.assert_close(found, passes.exponentiate_piece(plain, least, max(temperature, 1.0), power))
        torch.testing.assert_close(logits, plain)
        combine(logits, *factors, power)
        passes.combine_piece(plain, *factors, power)
        torch.testing.assert_close(logits, plain)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles for the CPU what is compiled for CUDA elsewhere")
def test_the_code_compiled_for_cuda_equals_the_eager_code() -> None:
    subprocess.run([sys.executable, "-c", COMPILED], check=True)  # without the checks of shapes, which are not compiled


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Triton, and a folder of programs and headers that is empty at first."""
    monkeypatch.setattr(passes.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(passes.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(passes.torch, "compile", lambda function, **_: functools.partial(function))
    passes.compiled_for_cuda.cache_clear()
    yield tmp_path
    passes.compiled_for_cuda.cache_clear()


def test_without_a_c_compiler_nothing_is_compiled_and_one_line_says_so(
    with_triton: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert passes.compiled_for_cuda(passes.combine_piece, "cuda") is passes.combine_piece
    assert caplog.text.count("combine_piece is not compiled because there is no C compiler") == 1
    (with_triton / "gcc").touch(mode=0o755)
    assert passes.compiled_for_cuda(passes.exponentiate_piece, "cuda") is passes.exponentiate_piece
    assert "because there is no " in caplog.records[-1].getMessage()
    assert "Python.h" in caplog.records[-1].getMessage()
    (with_triton / "Python.h").touch()
    passes.compiled_for_cuda.cache_clear()
    assert passes.compiled_for_cuda(passes.combine_piece, "cuda") is not passes.combine_piece


def test_nothing_is_compiled_for_a_cpu() -> None:
    assert passes.compiled_for_cuda(passes.combine_piece, "cpu") is passes.combine_piece
