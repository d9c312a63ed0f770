"""Does a cache of a hundred million targets open, read and train as one of a million does?

Each cache repeats the sequences of one shard (real ones with `--set cache=CACHE`). Its shards are hard links to the
same files, so reads come from the page cache at every size. Each size is measured in its own process:

    open            seconds until the cache is open
    memory          resident bytes that the open cache and 2,000 random reads of it add
    read            targets a second of random sequences
    step            targets a second that a small student is trained on, in full shuffle, the Trainer's own beginning
                    and end included; data wait is the trainer's figure

Ratios are over the smallest size, medians over repetitions in turns.

Not claimed: anything about disks, or about students that are worth training.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._tiled import plain_tokenizer, tiled_cache

STEP_BAR = 0.95
"""Of the largest size: the rate of its training steps over the smallest's, at least."""
MEMORY_BAR = 200e6
"""Of the largest size: resident bytes added, at most."""


def run(quick: bool, cache: str | None = None, folder: str | None = None) -> dict[str, object]:
    sizes = (200_000, 1_000_000) if quick else (1_000_000, 10_000_000, 100_000_000)
    repetitions, steps = (1, 5) if quick else (3, 40)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for size in sizes:
            source = tiled_cache(Path(root) / str(size), size, cache, k=16, tail_samples=8, encoding="q8")
        found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
        for _ in range(repetitions):
            for size in sizes:
                found[size].append(_measure(Path(root) / str(size), steps))
    medians = {
        size: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for size, rows in found.items()
    }
    ratios = {
        size: statistics.median(a["step"] / b["step"] for a, b in zip(rows, found[sizes[0]], strict=True))
        for size, rows in found.items()
    }
    print(f"{source}; K = 16 + 8 samples, q8\n")
    titles = ("open s", "memory MB", "read /s", "step /s", "of least", "data wait")
    print(f"{'targets':>12}" + "".join(f"{title:>12}" for title in titles))
    for size, row in medians.items():
        print(
            f"{row['targets']:12,.0f}{row['open']:12.2f}{row['memory'] / 1e6:12.0f}{row['read']:12,.0f}"
            f"{row['step']:12,.0f}{ratios[size]:11.3f}x{row['data wait']:12.2%}"
        )
    ratio, memory = ratios[sizes[-1]], medians[sizes[-1]]["memory"]
    print(f"\nstep rate {ratio:.3f} of the smallest's, at least {STEP_BAR}: {_verdict(ratio >= STEP_BAR)}")
    print(f"memory {memory / 1e6:.0f} MB, at most {MEMORY_BAR / 1e6:.0f}: {_verdict(memory <= MEMORY_BAR)}")
    return {"source": source, "medians": medians, "step rate over the least": ratios, "repetitions": repetitions}


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _measure(cache: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, str(cache), str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


def _look_at(place: str, steps: int) -> dict[str, float]:
    """Measure one cache; everything that is not the cache's is imported before the memory is."""
    import numpy as np

    from todi_offline.cache.reader import open_cache

    open_cache(place)[0]  # what is imported on first use
    before, started = _resident_bytes(), time.perf_counter()
    cache = open_cache(place)
    opened = time.perf_counter() - started
    chosen = np.random.default_rng(0).integers(0, len(cache), 2_000)
    started = time.perf_counter()
    targets = sum(len(cache[int(index)].targets) for index in chosen)
    seconds = time.perf_counter() - started
    found = {
        "targets": float(cache.num_targets.sum()),
        "open": opened,
        "memory": float(_resident_bytes() - before),
        "read": targets / seconds,
    }
    return found | _train(cache, steps)


def _train(cache: Any, steps: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from todi_offline.training.trainer import ToDiTrainer

    num_targets = 0  # which differ by the sequences that a shuffle brings first

    class Counting(ToDiTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal num_targets
            num_targets += len(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=cache.manifest.vocab_size, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            use_cpu=True,
            report_to="none",
            logging_steps=steps,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Counting(model, arguments, cache, processing_class=plain_tokenizer(cache.manifest.vocab_size))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    log = next(entry for entry in trainer.state.log_history if "data_wait_share" in entry)
    return {"step": num_targets / seconds, "data wait": log["data_wait_share"]}


if __name__ == "__main__":
    print(json.dumps(_look_at(sys.argv[1], int(sys.argv[2]))))
