"""A capture survives faults of processes, disks and power: it resumes, and ends with the same bytes."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row
from support import fake_cache
from support.disk import MODELS, Operation, Watch, after_power_loss, put_files
from support.fake_cache import write_cache
from support.tiny_models import save_llama

from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.objects import read_root
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.cache.store.locks import FolderLock
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheError

Files = dict[str, bytes]

SMALL = {"k": 4, "tail_samples": 1, "shard_tokens": 4096, "codec": "fast", "batch_tokens": 1024}
LENGTHS = {"max_length": 128, "max_prompt_length": 64}


def files_of(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class Captures:
    """The program of `faults.py`: imports everything once, and runs `todi capture` in one process after another."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        data = folder / "chats.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        teacher = save_llama(folder / "teacher", num_hidden_layers=1)
        config = {"teacher": str(teacher), "data": str(data), "settings": SMALL | LENGTHS}
        command = [sys.executable, "-m", "support.faults", json.dumps(config)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parent,
        )
        self._undisturbed = folder / "undisturbed"
        self.num_operations = self.run(self._undisturbed)["operations"]
        self.whole = files_of(self._undisturbed)
        assert sum(name.startswith("commits/") for name in self.whole) >= 3

    def run(self, out: Path, fault: str | None = None, at: float = -1) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"out": str(out), "fault": fault, "at": at}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        if fault is None:
            assert found["code"] == 0, found["error"]
        return found

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory, conversations: list[Row]) -> Iterator[Captures]:
    program = Captures(tmp_path_factory.mktemp("captures"), conversations[:100])
    yield program
    program.close()


def instants(num_operations: int, count: int) -> list[float]:
    """Draw instants: two of three are operations of the disk, the third a share of the time."""
    rng = np.random.default_rng(count)
    return [float(rng.random()) if n % 3 == 2 else float(rng.integers(1, num_operations + 1)) for n in range(count)]


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_a_capture_killed_at_any_moment_resumes_and_ends_with_the_same_bytes(
    captures: Captures, tmp_path: Path, count: int
) -> None:
    committed: Counter[int] = Counter()
    for number, instant in enumerate(instants(captures.num_operations, count)):
        root = tmp_path / str(number)
        if captures.run(root, "kill", instant)["code"] == 0:
            assert instant < 1  # it was done before
        committed[sum(name.startswith("commits/") and name.endswith(".json") for name in files_of(root))] += 1
        captures.run(root)
        assert files_of(root) == captures.whole, instant
    print(f"\n{count} captures killed; by the number of shards that were committed: {dict(sorted(committed.items()))}")
    assert len(committed) > 2


@pytest.mark.slow
def test_a_capture_killed_again_and_again_ends_with_the_same_bytes(captures: Captures, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        root = tmp_path / str(number)
        while captures.run(root, "kill", int(rng.integers(1, captures.num_operations)))["code"]:
            pass
        assert files_of(root) == captures.whole


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("SIGINT", "Aborted!"),
        ("SIGTERM", "Error: stopped by SIGTERM; committed work is safe, and the same command resumes it"),
        ("SIGHUP", "Error: stopped by SIGHUP; committed work is safe, and the same command resumes it"),
        ("teacher", "Error: out of memory: DefaultCPUAllocator: can't allocate memory"),
        ("memory", "Error: out of memory: MemoryError; committed work is safe; lower batch_tokens"),
        ("ENOSPC", "No space left on device"),
        ("EROFS", "Read-only file system"),
        ("EACCES", "Permission denied"),
        ("EIO", "Input/output error"),
    ],
)
def test_a_fault_that_stops_a_capture_is_one_line_and_leaves_no_files(
    captures: Captures, tmp_path: Path, fault: str, message: str, count: int
) -> None:
    rng = np.random.default_rng(list(map(ord, fault)))
    for number in range(count):
        root = tmp_path / str(number)
        at = int(rng.integers(2, 9) if fault == "teacher" else rng.integers(10, captures.num_operations - 10))
        found = captures.run(root, fault, at)
        while found["code"] == 0:  # a temporary file could not be deleted, which the next writer does
            shutil.rmtree(root)
            at += 1
            found = captures.run(root, fault, at)
        assert found["code"] == 1
        (line,) = found["error"].strip().splitlines()
        assert message in line
        assert not [name for name in files_of(root) if name.endswith(".tmp") or name == ".lock"]
        captures.run(root)
        assert files_of(root) == captures.whole


def test_a_folder_that_cannot_be_written_is_one_line(captures: Captures, tmp_path: Path) -> None:
    for name, fault in (("a", "EROFS"), ("b", "EACCES")):
        found = captures.run(tmp_path / name, fault, 1)
        assert found["code"] == 1
        assert found["error"].startswith(f"Error: cannot create {tmp_path / name}: ")
        assert found["error"].count("\n") == 1


def test_a_capture_of_a_cache_that_another_process_fills_names_it_and_a_dead_one_does_not_block(
    captures: Captures, tmp_path: Path
) -> None:
    assert captures.run(tmp_path, "kill", 40)["code"] == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with FolderLock(tmp_path):
        found = captures.run(tmp_path, "none")
        assert found["code"] == 1
        assert f"Error: {tmp_path} is being written by process {os.getpid()} on " in found["error"]
        assert found["error"].count("\n") == 1
    captures.run(tmp_path)
    assert files_of(tmp_path) == captures.whole


# What follows looks at every operation of the disk, with caches of a made-up teacher.

WRITTEN: dict[str, Any] = {"num_shards": 2, "per_shard": 2, "k": 2, "tail_samples": 0, "codec": "fast"}


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing for real, and make a sequence once: the same caches are written hundreds of times."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(fake_cache, "sequence", functools.lru_cache(fake_cache.sequence))


@pytest.fixture
def whole(tmp_path: Path, quick_disk: None) -> Files:
    return files_of(write_cache(tmp_path / "whole", **WRITTEN))


def operations(root: Path) -> list[Operation]:
    """Return all that writing a cache below a folder asks of the disk."""
    root.mkdir()
    with Watch(root) as watch:
        write_cache(root / "cache", **WRITTEN)
    return watch.log


def test_the_model_of_the_disk_sees_all_that_is_written(tmp_path: Path, whole: Files) -> None:
    log = operations(tmp_path / "watched")
    after = after_power_loss(log, "names are kept", np.random.default_rng(0))
    assert {name.removeprefix("cache/"): data for name, data in after.items()} == whole
    assert Counter(asked.kind for asked in log)["sync"] > 2 * len(whole)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failed_operation_is_one_line_and_committed_shards_stay(tmp_path: Path, whole: Files, step: int) -> None:
    causes = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)
    log, stopped = operations(tmp_path / "watched"), Counter[str]()
    num_operations = len(log)
    for at in [*range(1, num_operations, step), num_operations]:
        root, cause = tmp_path / f"fails {at}", causes[at // step % len(causes)]
        error = write_with_fault(root, at, cause)
        if error is not None:
            stopped[errno.errorcode[cause]] += 1
            assert os.strerror(cause) in error
            assert "\n" not in error
        found = files_of(root) if root.exists() else {}
        temporary = [name for name in found if name.endswith(".tmp")]
        assert len(temporary) <= 1 if error is None else not temporary  # one that could not be deleted
        assert_committed_is_whole(found, whole)
        assert files_of(write_cache(root, **WRITTEN)) == whole
    print(f"\noperations that failed, by cause: {dict(stopped)}")
    is_harmless = [asked.kind == "unlink" and asked.path.endswith((".tmp", ".lock")) for asked in log]
    assert stopped.total() > 0.9 * (num_operations - sum(is_harmless)) / step


def write_with_fault(root: Path, at: int, cause: int) -> str | None:
    """Write a cache; let the n-th operation fail, and return the message of the error."""
    count = 0

    def before(_: Operation) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(cause, os.strerror(cause))

    try:
        with Watch(root, before):
            write_cache(root, **WRITTEN)
    except CacheError as error:
        return str(error)
    return None


def assert_committed_is_whole(found: Files, whole: Files) -> None:
    """A record that can be read, or the root of a finished cache, implies everything that it names."""
    for name, data in found.items():
        if name.startswith("commits/") and name.endswith(".json"):
            assert data == whole[name], f"{name} is torn"
            missing = [key for key in json.loads(data)["objects"] if found.get(key) != whole[key]]
            assert not missing, f"{name} is there, but {missing} are lost or torn"
    if found.get("cache.json") == whole["cache.json"]:
        named = {name: data for name, data in whole.items() if not name.endswith("zarr.json")}  # which follow the root
        assert {name: data for name, data in found.items() if name in named} == named


@pytest.mark.parametrize("draws", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_power_may_fail_at_any_operation(tmp_path: Path, whole: Files, draws: int) -> None:
    log = operations(tmp_path / "watched")
    states = states_after_power_loss(log, 0, draws)
    print(f"\n{len(log)} operations, {len(states)} states of the disk after a loss of power")
    for number, state in enumerate(states):
        assert_committed_is_whole(dict(state), whole)
        root = tmp_path / f"lost {number}"
        put_files(root, dict(state))
        assert_opens_as_it_was(root)
        assert files_of(write_cache(root, **WRITTEN)) == whole


State = frozenset[tuple[str, bytes]]


def states_after_power_loss(log: list[Operation], begun: int, draws: int = 1) -> list[State]:
    """Return what the cache's folder may hold, had the power failed at any operation after the first `begun`."""
    states: dict[State, None] = {}
    for at in range(begun, len(log) + 1):
        for model in MODELS:
            for draw in range(draws if model == "anything" else 1):
                found = after_power_loss(log[:at], model, np.random.default_rng([at, draw]))
                states[frozenset((name.removeprefix("cache/"), data) for name, data in found.items())] = None
    return list(states)


def assert_opens_as_it_was(root: Path) -> None:
    """What is committed can be read, and nothing else is taken for it."""
    committed = [name for name in files_of(root) if name.startswith("commits/") and name.endswith(".json")]
    try:
        cache = open_cache(root, allow_unsealed=True)
    except CacheError:
        assert not committed
    else:
        assert len(cache) == WRITTEN["per_shard"] * len(committed)
        assert sum(1 for _ in cache) == len(cache)


def append_to(root: Path) -> Path:
    """Write a cache, or what is missing of it, then append a shard."""
    chosen = fake_cache.settings(k=2, tail_samples=0, codec="fast")
    begun = fake_cache.manifest(chosen, 1, 2)
    both = dataclasses.replace(begun, parts=(*begun.parts, dataclasses.replace(begun.parts[0], content="d")))
    for manifest in (begun, both):
        if manifest == begun and (root / "cache.json").exists() and len(read_root(LocalStore(root)).parts) == 2:
            continue
        with CacheWriter(root, manifest) as writer:
            for shard in writer.missing_shards():
                rows = [fake_cache.sequence(number, chosen) for number in (2 * shard, 2 * shard + 1)]
                writer.write_shard(shard, rows)
            writer.seal()
    return root


def test_power_may_fail_at_any_operation_of_an_append(tmp_path: Path, quick_disk: None) -> None:
    """At every instant the cache opens as it was or as it is to be; the same again ends with the same bytes."""
    whole, opened = files_of(append_to(tmp_path / "whole")), Counter[int]()
    root = tmp_path / "watched"
    root.mkdir()
    with Watch(root) as watch:
        append_to(root / "cache")
    swaps = [n for n, asked in enumerate(watch.log) if asked.kind == "rename" and asked.path == "cache/cache.json"]
    begun = next(n for n in range(swaps[0], len(watch.log)) if watch.log[n].kind == "sync")  # the old cache is sealed
    for number, state in enumerate(states_after_power_loss(watch.log, begun + 1)):
        root = tmp_path / f"lost {number}"
        put_files(root, dict(state))
        opened[sum(1 for _ in open_cache(root))] += 1
        assert files_of(append_to(root)) == whole
    print(f"\nan append that lost power, by the sequences of the cache as it was opened then: {dict(opened)}")
    assert set(opened) == {2, 4}


class Killed(BaseException):
    """Nothing runs after this, and nothing is cleaned up."""


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_capture_resumed_after_a_kill_survives_a_loss_of_power(tmp_path: Path, whole: Files, step: int) -> None:
    """What the killed process did not sync, and the next finds done, is not safe yet."""
    last = len(operations(tmp_path / "watched"))
    for at in sorted({*range(1, last, step), *range(last - 12, last + 1)}):  # the end is where a seal follows
        root, dead, count = tmp_path / f"killed {at}", False, 0
        root.mkdir()

        def before(_: Operation) -> None:
            nonlocal dead, count
            count += 1
            dead = dead or count == at  # noqa: B023 -- used within this round only
            if dead:
                raise Killed

        with Watch(root, before) as first, pytest.raises(Killed):
            write_cache(root / "cache", **WRITTEN)
        with Watch(root) as second:
            write_cache(root / "cache", **WRITTEN)
        found = after_power_loss([*first.log, *second.log], "unsynced is lost", np.random.default_rng(0))
        found.pop("cache/.lock", None)  # its removal need not last: the kernel holds the lock, not the file
        assert {name.removeprefix("cache/"): data for name, data in found.items()} == whole, at


def test_a_repaired_cache_survives_a_loss_of_power(tmp_path: Path, whole: Files) -> None:
    """Wherever a repair stops, repairing again and writing again end with the whole cache."""
    root = tmp_path / "watched"
    root.mkdir()
    with Watch(root) as watch:
        damaged = write_cache(root / "cache", **WRITTEN)
        (damaged / "topk_ids/c/1/0").write_bytes(b"damage")
        begun = len(watch.log)
        assert len(repair_cache(damaged).deleted) > 5
    for number, state in enumerate(states_after_power_loss(watch.log, begun)):
        root = tmp_path / f"lost {number}"
        put_files(root, dict(state))
        repair_cache(root)
        assert files_of(write_cache(root, **WRITTEN)) == whole
