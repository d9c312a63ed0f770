"""Does one coordinator keep up with 1,000 workers and 100,000 shards?

The coordinator and the store are the real ones: `capture(..., ray_actors=1000)` plans, hands out tasks, collects commit
records and seals a cache in a folder. The cluster is simulated on a clock of its own: an actor's teacher sleeps for
some seconds of that clock, then the actor commits a shard, whose arrays are links to those of the first one. So what is
measured is the processor time of this process, without that of the simulation:

    begin           plan 100,000 shards, begin the cache
    shard           hand out a task, take its result; a task here has one example of 2,100 tokens
    task            what a task of a full shard of 131,072 tokens takes on top, to cut it out of the data set
    seal            read the commit records, look at the size of each object, write the root, open the cache

`shard` and `task` together say how many shards a second the coordinator can hand out. So they say how long a worker
must take for a shard, if 1,000 workers are never to wait. Memory is the most that the process had beyond what it had
before.

Not claimed: anything about Ray's own scheduling, or about the requests of an object store.
"""

import contextlib
import heapq
import itertools
import os
import resource
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from benchmarks._tiled import VOCAB, plain_tokenizer
from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.objects import read_table
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing import CaptureConfig, capture
from todi_offline.capturing.config import RayConfig
from todi_offline.capturing.engines import TeacherDescription, recorded_versions
from todi_offline.capturing.work import ShardResult, ShardTask, Work
from todi_offline.data import Example, Examples
from todi_offline.data.examples import SCHEMA, as_dataset, examples_from_stream, record_batch
from todi_offline.teacher.in_transformers import TeacherConfig

LENGTH, FULL_SHARD = 2_100, 131_072
TEACHER_SECONDS = 60.0
"""Of the simulated clock, that a shard takes a worker on average."""
SETTINGS = CacheSettings(k=4, tail_samples=0, temperatures=(1.0,), shard_tokens=4096, codec="fast")


def run(quick: bool, shards: str = "100000", actors: str = "1000", folder: str | None = None) -> dict[str, object]:
    num_shards, num_actors = (500, 50) if quick else (int(shards), int(actors))
    examples = _examples(num_shards)
    cluster = _Cluster()
    config = CaptureConfig(
        out="", teacher=TeacherConfig(teacher="made up"), cache=SETTINGS, ray=RayConfig(ray_actors=num_actors)
    )
    before = _peak_bytes()
    with tempfile.TemporaryDirectory(dir=folder) as root, _in_place_of_ray(cluster):
        begun = time.process_time()
        summary = capture(data=examples, out=Path(root) / "cache", config=config)
        ended = time.process_time()
    assert summary.num_sequences == num_shards
    assert cluster.first is not None
    seconds = {
        "begin": cluster.first - begun,
        "shard": (cluster.last - cluster.first - cluster.simulated) / num_shards,
        "task": _task_seconds(),
        "seal": ended - cluster.last,
    }
    memory = _peak_bytes() - before
    each = seconds["shard"] + seconds["task"]
    print(f"{num_actors:,} workers, {num_shards:,} shards; processor seconds of the coordinator\n")
    for name, value in seconds.items():
        print(f"{name:8}{value:12.6f} s")
    print(f"{'memory':8}{memory / 1e6:12.1f} MB, {memory / num_shards:,.0f} bytes a shard")
    print(f"\n{1 / each:,.0f} shards a second: no worker waits if a shard takes it {num_actors * each:.1f} s or more;")
    print(f"begin and seal take {(seconds['begin'] + seconds['seal']) / num_shards * 1e3:.2f} ms a shard, once")
    return {
        "workers": num_actors,
        "shards": num_shards,
        "seconds": seconds,
        "memory": memory,
        "shards a second": 1 / each,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _example(number: int) -> Example:
    token_ids = np.random.default_rng(number).integers(0, VOCAB, LENGTH).astype(np.uint32)
    return Example(f"made-up:{number}", "made up", token_ids, np.arange(LENGTH) == LENGTH // 2)


def _examples(count: int) -> Examples:
    """Return a data set whose examples are a few, again and again, in the same memory."""
    batch = record_batch([_example(number) for number in range(100)])
    batches = [batch] * -(-count // len(batch))
    table = pa.Table.from_batches(batches, SCHEMA).slice(0, count)
    report = Examples.from_list([_example(0)]).report
    return Examples(as_dataset(table), report, {"form": "made up"})


def _task_seconds() -> float:
    """Return the processor seconds that it takes to cut the examples of a full shard out of a data set."""
    count = FULL_SHARD // LENGTH
    examples = _examples(100 * count)
    started = time.process_time()
    for shard in range(20):
        ShardTask.of(shard, examples, range(shard * count, (shard + 1) * count))
    return (time.process_time() - started) / 20


class _Ref:
    """A call that ends at an instant of the simulated clock, or a value that is there already."""

    def __init__(self, value: Any = None, work: Callable[[], Any] | None = None) -> None:
        self.value, self.work = value, work


class _Cluster:
    """In place of the module `ray`: actors that sleep on a clock of their own, then commit a shard."""

    exceptions = types.SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}), RayError=OSError)

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = self.simulated = 0.0
        self._now, self._numbers = 0.0, itertools.count()
        self._due: list[tuple[float, int, _Ref]] = []
        self._done: list[_Ref] = []
        self._rng = np.random.default_rng(0)
        self._source: tuple[Any, Any] | None = None

    def is_initialized(self) -> bool:
        return True

    def remote(self, _: type) -> Any:
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._start))

    def put(self, value: Any) -> _Ref:
        if isinstance(value, ShardTask) and self.first is None:
            self.first = time.process_time()
        return _Ref(value)

    def get(self, ref: _Ref) -> Any:
        return ref.value

    def kill(self, _: Any) -> None:
        """Do nothing: nobody asks the actor for anything from now on."""

    def wait(self, refs: list[_Ref], num_returns: int, timeout: float) -> tuple[list[_Ref], list[_Ref]]:
        """Let the clock run until a call ends; return that call."""
        with self._simulating():
            if not timeout or num_returns != 1:
                return [], refs
            self._now, _, ref = heapq.heappop(self._due)
            if ref.work is not None:
                ref.value = ref.work()
        if isinstance(ref.value, ShardResult):
            self.last = time.process_time()
        return [ref], [other for other in refs if other is not ref]

    @contextlib.contextmanager
    def _simulating(self) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.simulated += time.process_time() - started if self.first is not None else 0.0

    def _start(self, name: str, _: CaptureConfig) -> Any:
        return types.SimpleNamespace(
            load=types.SimpleNamespace(remote=lambda: self._call(0.0, _described)),
            num_tokens=types.SimpleNamespace(remote=lambda: self._call(0.1, lambda: 0)),
            capture=types.SimpleNamespace(
                remote=lambda writer, task, _: self._call(
                    TEACHER_SECONDS * (0.5 + self._rng.random()), lambda: self._commit(writer.value, task.value, name)
                )
            ),
        )

    def _call(self, seconds: float, work: Callable[[], Any]) -> _Ref:
        ref = _Ref(work=work)
        heapq.heappush(self._due, (self._now + seconds, next(self._numbers), ref))
        return ref

    def _commit(self, writer: ShardWriter, task: ShardTask, worker: str) -> ShardResult:
        if self._source is None:
            (example,) = examples_from_stream(task.examples)
            record = writer.write(task.shard, [_rows(example)])
            self._source = record, read_table(writer.store, record)
        else:
            record = writer.link(task.shard, writer.store, *self._source)
        return ShardResult(record, Work(1, LENGTH, 1, 0, TEACHER_SECONDS), worker)


def _rows(example: Example) -> SequenceRows:
    ids = np.arange(4, dtype=np.uint32)[None]
    values = np.full((1, 4), -2.0, np.float32)
    rows = TargetRows(ids, values, np.zeros((1, 1), np.float32), np.full(1, -2.0, np.float32), temperatures=(1.0,))
    return SequenceRows(example.id, example.source, example.token_ids, example.target_mask, rows)


def _described() -> TeacherDescription:
    return TeacherDescription(
        vocab_size=VOCAB,
        teacher={"model_type": "made up"},
        tokenizer=tokenizer_fingerprint(plain_tokenizer(VOCAB)),
        tokenizer_json=None,
        versions=recorded_versions(),
    )


@contextlib.contextmanager
def _in_place_of_ray(cluster: _Cluster) -> Iterator[None]:
    """Within, a capture finds this cluster; nothing is synced, for workers do that."""
    described = _described()
    with (
        mock.patch("todi_offline.capturing.ray_actors._import_ray", return_value=cluster),
        mock.patch(f"{__name__}._described", return_value=described),
        mock.patch.object(os, "fsync"),
    ):
        yield
