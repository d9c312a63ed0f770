"""Ranks of torchrun and accelerate share a capture, end together, and write the bytes of one process."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Row
from support.captures import LENGTHS, SMALL, Setting, example_of, records_of, sums_in_bucket, sums_of
from support.object_store import endpoint_of, s3_bucket
from support.programs import Answering

import cache_tools.__main__ as tools
from todi_offline.cache.check.diff import compare_caches
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.objects import noted_shards, read_note, read_record
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.cache.store.locks import FolderLock
from todi_offline.capturing import CaptureConfig
from todi_offline.config import load_config
from todi_offline.errors import ConfigError


def notes_of(root: Path) -> dict[int, tuple[int | None, ...]]:
    """The shards with a note, and where the processes at them died."""
    store = LocalStore(root)
    return {shard: read_note(store, shard).ended for shard in noted_shards(store)}


class Jobs:
    """The program of `rank_runs.py`, and the cache that a single process makes of its data."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        setting = Setting(folder, rows)
        config = {"teacher": str(setting.teacher), "data": str(setting.data), "settings": SMALL | LENGTHS}
        self._program = Answering("rank_runs", config, folder / "log")
        self.whole_root = folder / "whole"
        assert self.run(self.whole_root, 1)["codes"] == [0]
        self.whole = sums_of(self.whole_root)
        self.num_shards = len(records_of(self.whole_root))
        assert self.num_shards >= 4
        self.seconds: float = self.run(folder / "timed")["seconds"]
        """How long two undisturbed ranks take."""

    def run(self, out: Path | str, size: int = 2, **more: Any) -> dict[str, Any]:
        """Run a job; no rank of it may survive the SIGTERM that follows the end of another one."""
        found: dict[str, Any] = self._program.ask({"out": str(out), "size": size, **more})
        assert not found["are_stuck"], found
        return found

    def close(self) -> None:
        self._program.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, conversations: list[Row]) -> Iterator[Jobs]:
    program = Jobs(tmp_path_factory.mktemp("jobs"), conversations[:120])
    yield program
    program.close()


def errors_of(found: dict[str, Any]) -> list[str]:
    """What the ranks said is wrong: one line in all, of rank 0."""
    lines = [line for text in found["errors"] for line in text.splitlines() if line.startswith("Error:")]
    assert not any("Error:" in text or "Traceback" in text for text in found["errors"][1:]), found["errors"]
    return lines


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_leave_the_bytes_of_a_single_process(jobs: Jobs, tmp_path: Path, size: int) -> None:
    found = jobs.run(tmp_path / "cache", size)
    assert found["codes"] == [0] * size
    assert sums_of(tmp_path / "cache") == jobs.whole
    workers = json.loads(found["output"])["workers"]
    assert [name.partition(" on ")[0] for name in sorted(workers)] == [f"rank {rank}" for rank in range(size)]
    assert sum(work["num_shards"] for work in workers.values()) == jobs.num_shards
    again = jobs.run(tmp_path / "cache", size)
    assert json.loads(again["output"])["num_captured_tokens"] == 0


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_after_a_rank_was_killed_the_others_end_and_the_next_job_leaves_the_same_bytes(
    jobs: Jobs, tmp_path: Path, count: int
) -> None:
    rng = np.random.default_rng(count)
    for number in range(count):
        root = tmp_path / str(number)
        victims = [0, 1] if number % 4 == 3 else [number % 2]
        instant = jobs.seconds * float(rng.random())
        found = jobs.run(root, signals=[[victim, instant, "SIGKILL"] for victim in victims])
        is_whole = sums_of(root) == jobs.whole
        assert is_whole or all(found["codes"]), found  # a rank says 0 only where the job's work is done
        size = (1, 2, 3)[number % 3]  # goes on with any number of ranks, or without any
        assert jobs.run(root, size)["codes"] == [0] * size
        assert sums_of(root) == jobs.whole, (victims, instant)


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_whose_peer_dies_in_the_midst_of_its_work_end_by_themselves(
    jobs: Jobs, tmp_path: Path, victim: int
) -> None:
    """Rank r has the shards r, r + 2, ...; its teacher ends it at an example of the second of them."""
    found = jobs.run(tmp_path / "cache", poison={"id": example_of(jobs.whole_root, 2 + victim), "how": "kill"})
    assert found["codes"][victim] == -signal.SIGKILL
    assert found["codes"][1 - victim] == 1
    assert not found["were_ended"], found
    if victim:
        (line,) = errors_of(found)
        assert "another process of this job has ended or cannot be reached" in line
        assert "committed work is safe: run the same command again" in line
    assert jobs.run(tmp_path / "cache")["codes"] == [0, 0]
    assert sums_of(tmp_path / "cache") == jobs.whole


def test_a_job_that_gets_sigterm_ends_and_can_be_resumed(jobs: Jobs, tmp_path: Path) -> None:
    """SIGTERM reaches a rank that waits for the other one, where a handler of Python's would not run."""
    root = tmp_path / "cache"
    poison = {"id": example_of(jobs.whole_root, 3), "how": "stall"}
    found = jobs.run(root, poison=poison, signals=[[rank, 2 * jobs.seconds, "SIGTERM"] for rank in (0, 1)])
    assert set(found["codes"]) <= {-signal.SIGTERM, 128 + signal.SIGTERM}, found
    assert not notes_of(root)
    assert jobs.run(root)["codes"] == [0, 0]
    assert sums_of(root) == jobs.whole


def test_ranks_that_were_started_again_do_not_meet_the_addresses_of_the_dead(jobs: Jobs, tmp_path: Path) -> None:
    """As `torchrun --max-restarts` does: the store of the first attempt is that of the second."""
    found = jobs.run(tmp_path / "cache", restarts=[[[1, 0.6 * jobs.seconds, "SIGKILL"]]])
    assert found["codes"] == [0, 0], found
    assert sums_of(tmp_path / "cache") == jobs.whole


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("data", "the ranks do not work on the same capture: parts"),
        ("teacher", "teacher.weights: not the same"),
        ("versions", "on rank 0, '0.1' on rank 1"),
    ],
)
def test_ranks_that_disagree_are_refused(jobs: Jobs, tmp_path: Path, what: str, named: str) -> None:
    found = jobs.run(tmp_path / "cache", odd={"rank": 1, "what": what})
    assert found["codes"] == [1, 1]
    (line,) = errors_of(found)
    assert named in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_raised_on_all(jobs: Jobs, tmp_path: Path, rank: int) -> None:
    found = jobs.run(tmp_path / "cache", odd={"rank": rank, "what": "broken"})
    assert found["codes"] == [1, 1]
    assert errors_of(found) == ["Error: the weights cannot be read; fetch them again"]


@pytest.mark.parametrize("size", [1, 2])
def test_an_example_at_which_the_teacher_fails_is_named_and_committed_shards_stay(
    jobs: Jobs, tmp_path: Path, size: int
) -> None:
    root = tmp_path / "cache"
    poison = {"id": example_of(jobs.whole_root, 3), "how": "raise"}
    found = jobs.run(root, size, poison=poison)
    assert found["codes"] == [1] * size
    (line,) = errors_of(found)
    assert line == (
        f"Error: example {poison['id']!r} of shard 3 cannot be captured: RuntimeError: no kernel for this; committed "
        "work is safe"
    )
    committed = records_of(root)
    assert "000003.json" not in committed
    assert len(committed) >= 2
    assert not notes_of(root)
    assert jobs.run(root, size)["codes"] == [0] * size
    assert sums_of(root) == jobs.whole


@pytest.mark.parametrize("size", [1, 2])
def test_an_example_that_kills_its_process_is_found_by_the_runs_that_follow(
    jobs: Jobs, tmp_path: Path, size: int
) -> None:
    """The first run dies at it, two more find it, the fourth names it; a preemption in between accuses nobody."""
    root, shard = tmp_path / "cache", 1
    poison = {"id": example_of(jobs.whole_root, shard), "how": "kill"}
    preempted = {"id": example_of(jobs.whole_root, shard, 1), "how": "preempt"}
    whole_shard, itself = (None,), (None, 2)
    others = [name for name in records_of(jobs.whole_root) if name != f"{shard:06d}.json"]

    def run(given: dict[str, str] | None, *words: str) -> list[str]:
        found = jobs.run(root, size, poison=given, words=list(words))
        assert found["codes"] == [0] * size or any(found["codes"]), found
        return errors_of(found)

    run(poison)
    assert notes_of(root)[shard] == whole_shard
    run(preempted)
    assert notes_of(root) == {shard: whole_shard}
    assert records_of(root) == others
    run(poison)
    assert notes_of(root) == {shard: itself}
    run(poison)
    assert notes_of(root) == {shard: (*itself, 2)}
    (line,) = run(poison)
    assert line == (
        f"Error: each worker that read example {poison['id']!r} of shard {shard} died: the last two runs died "
        "there; committed work is safe. Leave the example out with --skip-failed, or remove it from the data"
    )
    shutil.copytree(root, tmp_path / "cured")
    assert verify_cache(root)  # what is left is said, and no damage
    assert run(poison, "--skip-failed") == []
    assert open_cache(root).manifest.parts[0].left_out == {poison["id"]: "each worker that read it died"}
    assert (len(open_cache(root)), verify_cache(root)) == (len(open_cache(jobs.whole_root)) - 1, [])
    jobs.run(tmp_path / "cured", size)
    assert sums_of(tmp_path / "cured") == jobs.whole


@pytest.mark.parametrize("size", [1, 2])
def test_a_process_that_is_told_to_end_leaves_no_note(jobs: Jobs, tmp_path: Path, size: int) -> None:
    found = jobs.run(tmp_path / "cache", size, poison={"id": example_of(jobs.whole_root, 2), "how": "preempt"})
    assert all(found["codes"]), found
    assert not notes_of(tmp_path / "cache")
    assert jobs.run(tmp_path / "cache", size)["codes"] == [0] * size
    assert sums_of(tmp_path / "cache") == jobs.whole


@pytest.fixture(scope="module")
def skipped(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """An example at which the teacher fails, and what one process makes of the data without it."""
    root, poison = tmp_path_factory.mktemp("skipped") / "cache", {"id": example_of(jobs.whole_root, 3), "how": "raise"}
    found = jobs.run(root, 1, poison=poison, words=["--skip-failed"])
    assert found["codes"] == [0]
    assert json.loads(found["output"])["left_out"] == {poison["id"]: "RuntimeError: no kernel for this"}
    return poison, root


def test_an_example_that_is_left_out_is_named_in_the_cache(jobs: Jobs, skipped: tuple[dict[str, str], Path]) -> None:
    poison, root = skipped
    cache, whole = open_cache(root), open_cache(jobs.whole_root)
    (part,) = cache.manifest.parts
    assert part.left_out == {poison["id"]: "RuntimeError: no kernel for this"}
    assert (part.num_sequences, part.planned) == (len(cache), whole.manifest.parts[0])
    ids = [example for example in whole.sequences["id"].to_pylist() if example != poison["id"]]
    assert cache.sequences["id"].to_pylist() == ids
    assert verify_cache(root) == []
    shown = CliRunner().invoke(tools.cli, ["inspect", str(root)]).output
    assert f"left out     {poison['id']}: RuntimeError: no kernel for this" in shown
    for shard in (0, 1, 2):  # the others are those of the whole cache
        assert read_record(cache.store, cache.manifest, shard, None) == read_record(
            whole.store, whole.manifest, shard, None
        )


def test_ranks_skip_the_same_example_after_any_stop(
    jobs: Jobs, skipped: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    poison, expected = skipped
    words, root = ["--skip-failed"], tmp_path / "cache"
    jobs.run(root, poison=poison, words=words, signals=[[rank, 0.8 * jobs.seconds, "SIGKILL"] for rank in (0, 1)])
    assert jobs.run(root, poison=poison, words=words)["codes"] == [0, 0]
    assert sums_of(root) == sums_of(expected)
    again = jobs.run(root)  # it stays left out
    assert json.loads(again["output"])["num_captured_tokens"] == 0
    assert sums_of(root) == sums_of(expected)


def test_a_second_job_is_refused_by_the_lock_of_the_first_on_all_of_its_ranks(jobs: Jobs, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(jobs.whole_root, root)
    (root / "commits" / "000001.json").unlink()
    with FolderLock(root):
        found = jobs.run(root)
    assert found["codes"] == [1, 1]
    (line,) = errors_of(found)
    assert "is being written by process" in line


# A teacher that is split.


def test_a_teacher_split_over_ranks_equals_the_whole_one(jobs: Jobs, tmp_path: Path) -> None:
    root, words = tmp_path / "cache", ["--tp", "2"]
    found = jobs.run(root, words=words, loads=True)
    assert found["codes"] == [0, 0], found
    assert [name[:6] for name in json.loads(found["output"])["workers"]] == ["rank 0"]
    split, whole = open_cache(root), open_cache(jobs.whole_root)
    assert split.manifest == whole.manifest
    compared = compare_caches(split, whole)
    assert (compared["shared"], compared["only_first"], compared["only_second"]) == (len(whole), 0, 0)
    assert compared["targets"]["mean_kl"] < 1e-5, compared
    poison = {"id": example_of(jobs.whole_root, 2), "how": "kill"}
    killed = jobs.run(tmp_path / "again", words=words, loads=True, poison=poison)
    assert all(killed["codes"]), killed
    assert jobs.run(tmp_path / "again", words=words, loads=True)["codes"] == [0, 0]
    assert sums_of(tmp_path / "again") == sums_of(root)


@pytest.mark.parametrize("size", [1, 3])
def test_a_teacher_is_split_over_all_ranks_or_not_at_all(jobs: Jobs, tmp_path: Path, size: int) -> None:
    found = jobs.run(tmp_path / "cache", size, words=["--tp", "2"], loads=True)
    assert found["codes"] == [1] * size
    (line,) = errors_of(found)
    assert line.startswith(f"Error: tp is 2, and this job has {size} rank")
    assert "torchrun --nproc-per-node 2 -m todi_offline capture --tp 2" in line


def test_a_teacher_that_transformers_spreads_leaves_the_same_bytes(jobs: Jobs, tmp_path: Path) -> None:
    found = jobs.run(tmp_path / "cache", words=["--device-map", "auto"], loads=True)
    assert found["codes"] == [0, 0], found
    assert sums_of(tmp_path / "cache") == jobs.whole


@pytest.mark.parametrize("other", [{"device_map": "auto"}, {"ray_actors": 2}, {"engine": "vllm"}])
def test_a_split_teacher_is_refused_where_another_setting_spreads_it(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^tp "):
        load_config(CaptureConfig, overrides={"teacher": "a", "data": "b", "out": "c", "tp": 2} | other)


# Straight to an object store, which all ranks write to.


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """What ranks must know to find `s3://bucket`."""
    with s3_bucket() as proxy:
        yield endpoint_of(proxy)


@pytest.mark.parametrize("lease", [None, 1.0])
def test_ranks_write_to_an_object_store_and_the_next_job_takes_over_from_a_killed_one(
    jobs: Jobs, bucket: dict[str, str], lease: float | None
) -> None:
    """The next job sees that the holder of the lock is dead or, on another machine, that the lock stands still."""
    place = f"s3://bucket/{lease}"
    poison = {"id": example_of(jobs.whole_root, 3), "how": "kill"}
    found = jobs.run(place, environ=bucket, poison=poison, lease=lease)
    assert -signal.SIGKILL in found["codes"], found
    committed = sum(key.endswith(".json") for key in sums_in_bucket(place) if key.startswith("commits/"))
    assert 0 < committed < jobs.num_shards
    assert any(key.endswith(".attempt") for key in sums_in_bucket(place))
    found = jobs.run(place, environ=bucket, lease=lease)
    assert found["codes"] == [0, 0], found
    assert sums_in_bucket(place) == jobs.whole
