"""Runs an operation on caches many times, each in its own process that is killed midway.

This is a program that imports everything once, and forks for each run:

    python -m support.kills < runs > outcomes

A run is a line of JSON, {"name": operation, "folder": inputs, "out": place, "at": instant}; an outcome is {"code": ...,
"operations": ...}. An instant is the number of an operation of the disk at `out`, before which the process dies; 0 for
never. If the operation is a write, half of its data are written.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zarr  # noqa: F401 -- once, not in every child

from support.composing import capture_into
from support.disk import Operation, Watch
from support.fake_cache import settings
from todi_offline.cache.convert.choosing import choose
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.reader import open_cache

CHOSEN = settings(codec="fast")
STRETCH = 20  # a shard of a capture has three sequences or so


def append(_folder: Path, out: Path) -> None:
    capture_into(out, range(4, 14), CHOSEN, stretch=STRETCH)


def merge(folder: Path, out: Path) -> None:
    merge_caches([str(folder / "a"), str(folder / "b")], str(out))


def subset(folder: Path, out: Path) -> None:
    cache = open_cache(folder / "large")
    chosen, recipe = choose(cache, None, None, None, "num_tokens > 20", None)
    subset_cache(cache, str(out), chosen, recipe, k=4)


def import_(folder: Path, out: Path) -> None:
    import_table(folder / "large.parquet", str(out))


OPERATIONS: dict[str, Callable[[Path, Path], None]] = {
    "append": append,
    "merge": merge,
    "subset": subset,
    "import": import_,
}


def outcome(run: dict[str, Any]) -> dict[str, Any]:
    """Fork, carry out the run in the child, and return its outcome."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.write(writer, json.dumps(work(run)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = json.loads(said.read() or "{}")
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), **found}


def work(run: dict[str, Any]) -> dict[str, int]:
    """Run an operation in this process, which may be killed midway; return the number of its disk operations."""
    count, at = 0, run["at"]

    def before(asked: Operation) -> None:
        nonlocal count
        count += 1
        if count == at:
            if asked.kind == "write":
                (Path(run["out"]) / asked.path).write_bytes(asked.data[: len(asked.data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    with Watch(Path(run["out"]), before):
        OPERATIONS[run["name"]](Path(run["folder"]), Path(run["out"]))
    return {"operations": count}


if __name__ == "__main__":
    os.fsync = lambda _: None  # unsynced data survive the death of a process
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line))), flush=True)
