"""How close is `todi plan` to the capture that it plans, in bytes and in time?

The plan is made first, from a probe of some sequences; then the same settings are captured, with k = 64 and 8 samples
in f16. Time is that of the whole call, loading included. `todi-cache subset` then cuts the cache to each of the
other rows of the plan's table, and the bytes are compared with those of the row.

Both are printed in results/plan.md. The teacher is SmolLM2-135M-Instruct and reads Python's own documentation;
`--set teacher=FOLDER` and `--set data=FILE` take others.

Not claimed: the time on another machine, or on one that does other work during one of the two.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks._environment import environment, listed
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.commands.demo import fetch_teacher
from todi_offline.commands.terminal import print_capture, print_plan, size
from todi_offline.costing import Plan, plan

RESULT = Path(__file__).parent / "results" / "plan.md"
BARS = {"bytes": 0.03, "time": 0.20}
"""How far from 1 a ratio may be."""


def run(
    quick: bool,
    teacher: str | None = None,
    data: str = "stdlib",
    limit: str = "400",
    probe: str = "64",
    max_length: str = "256",
) -> dict[str, object]:
    settings: dict[str, Any] = {
        "teacher": teacher or str(fetch_teacher()),
        "data": data,
        "limit": 20 if quick else int(limit),
        "max_length": int(max_length),
        "k": 64,
        "tail_samples": 8,
        "encoding": "f16",
    }
    planned = plan(probe=4 if quick else int(probe), **settings)
    assert planned.duration is not None, "the probe has measured"
    parts = [_printed(print_plan, planned)]
    with tempfile.TemporaryDirectory() as folder:
        started = perf_counter()
        captured = capture(out=f"{folder}/cache", **settings)
        seconds = perf_counter() - started
        parts.append(_printed(print_capture, captured))
        cache = open_cache(f"{folder}/cache")
        rows = _rows(planned, cache, folder)
        num_files = sum(path.is_file() for path in Path(cache.root).rglob("*"))
    time_ratio = planned.duration.seconds / seconds
    worst = max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1))
    lines = [
        f"- bytes: planned over captured, {worst:.3f} at worst of {len(rows)} rows, {_verdict('bytes', worst)}",
        f"- time: {planned.duration.seconds:.0f} s planned, {seconds:.0f} s captured, {time_ratio:.2f}, "
        f"{_verdict('time', time_ratio)}",
        f"- files: {planned.num_files} planned, {num_files} captured",
    ]
    print("\n\n".join(parts), _table(rows), *lines, sep="\n")
    if not quick:
        _write(settings | {"teacher": Path(settings["teacher"]).name, "data": Path(data).name}, parts, rows, lines)
    return {}


def _rows(planned: Plan, cache: Cache, folder: str) -> list[dict[str, Any]]:
    """Cut the cache to every row of the table, and compare the bytes."""
    rows = []
    for choice in planned.choices:
        place = f"{folder}/{choice.k}-{choice.tail_samples}-{choice.encoding}"
        shape: dict[str, Any] = {"k": choice.k, "tail_samples": choice.tail_samples, "encoding": choice.encoding}
        subset_cache(cache, place, np.ones(len(cache), np.bool_), {}, **shape)
        found = sum(open_cache(place).bytes_by_array.values())
        assert choice.total_bytes is not None, "the probe has measured"
        rows.append({**shape, "planned": choice.total_bytes, "found": found, "ratio": choice.total_bytes / found})
    return rows


def _printed(show: Callable[[Any], None], what: Any) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show(what)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _verdict(name: str, ratio: float) -> str:
    bar = BARS[name]
    return f"{bar:.0%} allowed: {'met' if abs(ratio - 1) <= bar else 'missed'}"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| k + samples | encoding | planned | captured | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['k']} + {row['tail_samples']} | {row['encoding']} | {size(row['planned'])} | {size(row['found'])} "
        f"| {row['ratio']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _write(settings: dict[str, Any], parts: list[str], rows: list[dict[str, Any]], lines: list[str]) -> None:
    plain = ("teacher", "data", "limit", "max_length")
    chosen = " ".join(f"--set {name}={settings[name]}" for name in plain)
    text = [
        "# plan",
        f"`python -m benchmarks plan {chosen}`",
        f"```\n{listed(environment())}\n```",
        *lines,
        _table(rows),
        "## What `todi plan` says",
        f"```\n{parts[0]}\n```",
        "## What `todi capture` says",
        f"```\n{parts[1]}\n```",
    ]
    RESULT.write_text("\n\n".join(text).replace("\n\n- ", "\n- ") + "\n")
