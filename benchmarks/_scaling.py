"""A number of ranks or actors in, their speed-up over one worker out; each worker has one thread."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from todi_offline.data.stdlib_corpus import stdlib_pairs

BAR = 1.7
"""Two workers' rate over one's, at least."""
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 3_000.0


def compare(teacher: Any, workers: dict[str, int], repetitions: int, limit: int) -> dict[str, object]:
    """Capture in one process and in each number of workers, in turns; print and return their rates.

    A rate counts from the moment when all workers have loaded the teacher, and the cache is begun, to its seal. The
    seconds before that are the start.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher.model.save_pretrained(root / "teacher")
        teacher.tokenizer.save_pretrained(root / "teacher")
        data = root / "texts.jsonl"
        texts = [pair.response for pair in stdlib_pairs() if len(pair.response) > 1_500][:limit]
        data.write_text("".join(json.dumps({"text": text[:1_500]}) + "\n" for text in texts))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ("one", *workers)}
        for turn in range(repetitions):
            for name in found:
                found[name].append(_measure(root, data, name, workers.get(name, 1), turn))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    print(f"{'':12}{'workers':>8}{'start s':>10}{'capture s':>11}{'tokens/s':>10}{'of one':>8}")
    ratios = {}
    for name, row in medians.items():
        pairs = zip(found[name], found["one"], strict=True)
        ratios[name] = [round(mine["rate"] / one["rate"], 3) for mine, one in pairs]
        median = statistics.median(ratios[name])
        shown = f"{row['start']:10.1f}{row['seconds']:11.1f}{row['rate']:10,.0f}{median:8.2f}"
        print(f"{name:12}{workers.get(name, 1):8}{shown}")
    for name, number in workers.items():
        if number == 2:
            median = statistics.median(ratios[name])
            print(
                f"two {name}: {median:.2f} of one worker's rate, at least {BAR}: {'met' if median >= BAR else 'MISSED'}"
            )
    return {"medians": medians, "rates over one worker's, by turn": ratios}


def _measure(root: Path, data: Path, name: str, number: int, turn: int) -> dict[str, float]:
    """Run one capture, and look when its cache is begun and sealed."""
    out = root / f"{name}-{turn}"
    options = [f"--teacher={root / 'teacher'}", f"--data={data}", f"--out={out}", "--shard-tokens=4096", "--json"]
    options += ["--device=cpu", *([f"--ray-actors={number}"] if name == "actors" else [])]
    command = [sys.executable, "-m"]
    if name == "ranks":
        command += ["torch.distributed.run", f"--nproc-per-node={number}", "--standalone", "-m"]
    started = time.time()
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "todi_offline", "capture", *options], stdout=subprocess.PIPE, env=environ
    ) as process:
        begun = _begun(out / "cache.json", process)
        output, _ = process.communicate(timeout=_PATIENCE_SECONDS)
    assert process.returncode == 0, name
    seconds = (out / "cache.json").stat().st_mtime - begun
    return {
        "start": begun - started,
        "seconds": seconds,
        "rate": json.loads(output)["num_captured_tokens"] / seconds,
    }


def _begun(root: Path, process: "subprocess.Popen[bytes]") -> float:
    """Return when the root of a cache was written first."""
    while process.poll() is None:
        if root.exists():
            return root.stat().st_mtime
        time.sleep(_POLL_SECONDS)
    raise AssertionError("the capture ended before it began")
