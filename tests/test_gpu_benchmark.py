"""`python -m benchmarks gpu` runs, at tiny sizes on a CPU; what it measures there says nothing."""

import itertools
from typing import Any

import pytest
import torch

from benchmarks import gpu, step
from todi_offline.data.stdlib_corpus import stdlib_pairs


def test_the_losses_are_timed_in_both_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    measured: Any = gpu.run(quick=True, device="cpu", parts="loss")
    assert measured["device"] == "cpu"
    for dtype in ("float32", "bfloat16"):
        found = measured["loss"][dtype]
        assert {"products", "cross_entropy", "fused, samples", "readable, samples", "dense"} <= found["seconds"].keys()
        assert found["bytes"].keys() == found["seconds"].keys()
        assert all(seconds > 0 for seconds in found["seconds"].values())
    assert "# loss on cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "stdlib_pairs", lambda: itertools.islice(stdlib_pairs(), 300))  # for the tokenizer
    measured: Any = gpu.run(quick=True, device="cpu", parts="step")
    assert measured["step"]["tokens_per_second"]["fused"] > 0


@pytest.mark.slow
def test_captures_are_timed() -> None:
    measured: Any = gpu.run(quick=True, device="cpu", parts="capture")
    assert measured["capture"]["tokens"] > 0


def test_a_step_that_does_not_run_is_named_and_the_others_are_timed() -> None:
    seconds: dict[str, list[float]] = {"good": [], "bad": []}
    failures: dict[str, str] = {}

    def bad() -> None:
        raise RuntimeError("no kernel\nin this place")

    gpu._time("bad", bad, "cpu", seconds, failures)
    gpu._time("good", lambda: None, "cpu", seconds, failures)
    assert failures == {"bad": "no kernel"}
    assert len(seconds["good"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="there is no CUDA device; --set device=cpu shows that the code runs"):
        gpu.run(quick=True)
