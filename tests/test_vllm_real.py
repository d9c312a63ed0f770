"""Real vLLM in its own environment: its targets equal those of transformers, and a capture survives its death.

Run with TODI_VLLM_PYTHON=/path/to/an/environment/bin/python; see benchmarks/results/vllm.md for how to make one.
"""

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import llama, save
from support.vllm_environment import ROOT, START_SECONDS, needs_vllm, run, run_mode, start

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache
from todi_offline.capturing import capture

pytestmark = needs_vllm

EAGER = ("--engine", "vllm", "--engine-set", "enforce_eager=true")
SMALL: dict[str, Any] = {"k": 8, "tail_samples": 2, "shard_tokens": 4096, "max_length": 128}


@pytest.fixture(scope="module")
def model() -> Any:
    """With heads of 32, the least that vLLM has kernels for on a CPU."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    return llama(**shape)


@pytest.fixture(scope="module")
def teacher(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("teacher"))


def command(teacher: Path, out: Path, limit: int) -> list[object]:
    settings = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", value)]
    return ["todi_offline", "capture", "--teacher", teacher, "--out", out, "--limit", limit, *settings, *EAGER]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        pytest.param({"max_num_batched_tokens": 64}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, id="in process, chunks"),
        pytest.param({"enable_prefix_caching": True}, {}, id="engine process, prefix cache"),
        pytest.param({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, id="two workers"),
    ],
)
def test_targets_equal_those_of_transformers(teacher: Path, options: dict[str, Any], changes: dict[str, str]) -> None:
    found = run_mode(teacher, options, **changes)
    assert found["ids_same"] >= 0.999 * found["ids"]
    assert found["tail_ids_same"] >= 0.999 * found["tail_ids"]
    assert max(found["logprobs"], found["tails"], found["labels"]) < 2e-4


def test_a_capture_is_whole_and_of_the_same_teacher_as_one_by_transformers(teacher: Path, tmp_path: Path) -> None:
    run(command(teacher, tmp_path / "a", 12))
    capture(teacher, out=tmp_path / "b", device="cpu", limit=12, **SMALL)
    assert verify_cache(tmp_path / "a") == []
    caches = [open_cache(tmp_path / name) for name in "ab"]
    assert caches[0].manifest.teacher == caches[1].manifest.teacher
    assert caches[0].manifest.tokenizer == caches[1].manifest.tokenizer
    assert caches[0].num_targets.tolist() == caches[1].num_targets.tolist()


def test_actors_of_ray_each_run_an_engine_of_their_own_and_leave_none(teacher: Path, tmp_path: Path) -> None:
    with start(["pip", "show", "ray"]) as asked:
        if asked.wait():
            pytest.skip("the environment of vLLM has no Ray")
    mark = str(tmp_path)
    found = run([*command(teacher, tmp_path / "r", 400), "--ray-actors", 2, "--json"], TODI_MARK=mark)
    workers = json.loads(found.stdout)["workers"]
    assert workers
    assert all(name.startswith("actor ") for name in workers)
    assert verify_cache(tmp_path / "r") == []
    started = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("TODI_MARK") == mark]
    assert psutil.wait_procs(started, timeout=120)[1] == []


@pytest.mark.parametrize("victim", ["engine", "driver"])
def test_after_a_kill_no_process_is_left_and_the_same_command_resumes(
    teacher: Path, tmp_path: Path, victim: str
) -> None:
    args = command(teacher, tmp_path / "c", 4000)
    with start(args) as process:
        assert process.stderr is not None
        is_committed = re.compile(r"[1-9]\d* of \d+ shards").search
        next(line for line in process.stderr if is_committed(line))
        below = psutil.Process(process.pid).children(recursive=True)
        engines = [one for one in below if "VLLM" in " ".join(one.cmdline())]
        (engines[0] if victim == "engine" else process).kill()
        errors = process.stderr.read()
        code = process.wait(START_SECONDS)
    if victim == "engine":
        assert code == 1
        assert "Error: shard" in errors
        assert "vLLM has died" in errors
    assert psutil.wait_procs(engines, timeout=60)[1] == []
    run(args)
    assert verify_cache(tmp_path / "c") == []


def test_a_poison_example_is_named_with_its_position(model: Any, tmp_path: Path) -> None:
    common = tiny_tokenizer().encode(" the")[0]
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        kept = weight[common].clone()
        weight[common] = torch.nan
        teacher = save(model, tmp_path / "teacher")
        weight[common] = kept
    found = run(command(teacher, tmp_path / "d", 3), code=1)
    assert "shard 0: the teacher's logits for example" in found.stderr
    assert "at position" in found.stderr


def test_the_private_names_are_still_there() -> None:
    """Model runner V2 needs Triton, which has no build for CPUs; so its names alone are compared."""
    found = json.loads(run(["support.vllm_names"], PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}").stdout)
    assert {"req_ids", "query_start_loc_np", "num_computed_prefill_tokens_np", "num_scheduled_tokens"} <= set(
        found["fields"]
    )
    assert found["ours"].keys() == found["methods"].keys()
    assert all(count in (100, found["methods"][name]) for name, count in found["ours"].items())
    assert found["ours_v1"] == found["v1"]
    assert found["v2_has_worker"]
    assert found["v2_is_told_apart"]
