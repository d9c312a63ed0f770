"""Repair deletes only damaged shards, so that the same capture redoes only these."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from support import fake_cache
from support.damage import KINDS, Files, stray
from support.disk import FailingReads, Operation, Watch
from support.fake_cache import (
    FOREIGN,
    forge_rows,
    forge_table,
    manifest,
    sequence,
    settings,
    write_cache,
    write_foreign,
)
from support.tools import run

from todi_offline.cache.check.repair import Repair, repair_cache
from todi_offline.cache.check.verify import object_keys, verify_cache
from todi_offline.cache.format.names import record_key
from todi_offline.cache.objects import committed_shards, read_root
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheError, CacheFormatError, CacheLockedError, CacheMismatchError


def files_in(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shards_with(root: Path, keys: set[str]) -> set[int]:
    """Return the shards that these objects are of, their records included."""
    found = read_root(LocalStore(root))
    shards = range(found.manifest.num_shards)
    return {shard for shard in shards if keys & {record_key(shard), *object_keys(found, shard)}}


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing for real, and make a sequence once: the same caches are written hundreds of times."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(fake_cache, "sequence", functools.lru_cache(fake_cache.sequence))


def test_a_whole_cache_is_left_as_it_is(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    assert repair_cache(root) == Repair()
    assert files_in(root) == whole
    assert run("repair", root).output == f"{root} is whole\n"


def test_unfinished_work_is_not_damage(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=3, seal=False)
    (root / "commits/000002.json").unlink()
    (root / "topk_ids/c/2/0").write_bytes(b"half")
    begun = files_in(root)
    repair = repair_cache(root)
    assert (repair.deleted, repair.renewed, repair.shards, repair.lost) == ((), (), (), ())
    assert files_in(root) == begun
    assert run("repair", root).output == "run the capture of source fake again: it finishes the cache\n"


def test_no_foreign_file_is_ever_deleted(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    write_foreign(root)
    (root / "nested/token_ids/c/0").write_bytes(b"damage")
    begun = files_in(root)
    assert repair_cache(root) == Repair()
    assert files_in(root) == begun
    for array in ("topk_ids", "sequences", "commits"):
        shutil.rmtree(root / array / "c" if (root / array / "c").exists() else root / array)
    (root / "topk_ids/c/7").mkdir(parents=True)
    (root / "topk_ids/c/7/0").write_bytes(b"of no shard")
    repair_cache(root)
    kept = {key: data for key, data in begun.items() if key.startswith("nested/") or key in FOREIGN[:-3]}
    assert kept.items() <= files_in(root).items()
    assert "topk_ids/c/7/0" not in files_in(root)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_random_damage_only_damaged_shards_are_redone(tmp_path: Path, quick_disk: None, count: int) -> None:
    shape = {"num_shards": 3, "per_shard": 4}
    root, other = write_cache(tmp_path / "cache", **shape), write_cache(tmp_path / "other", num_shards=3, per_shard=5)
    whole, copy, table = files_in(root), tmp_path / "copy", Counter[str]()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        shutil.copytree(root, copy)
        what = f"{kind.__name__} of {kind(copy, np.random.default_rng(number), other)}, damage {number}"
        before = files_in(copy)
        damaged = {key for key in {*whole, *before} if before.get(key) != whole.get(key)}
        planned = repair_cache(copy, dry_run=True)
        assert files_in(copy) == before, what
        repair = repair_cache(copy)
        assert repair == planned, what
        assert_done(repair, before, files_in(copy), what)
        if repair.remaining:  # root and copy exchanged: both are damaged
            assert damaged >= {"cache.json", "zarr.json"}, what
            table["nothing done"] += 1
        else:
            assert set(repair.shards) == shards_with(root, damaged), what
            assert set(repair.shards) == {0, 1, 2} - set(committed_shards(LocalStore(copy))), what
            found = files_in(write_cache(copy, **shape))
            assert found | ({} if kind is not stray else whole) == found, what
            assert {key: data for key, data in found.items() if "stray" not in key} == whole, what
            table[f"{len(repair.shards)} shards made anew"] += 1
        shutil.rmtree(copy)
    print(f"\n{count} damages: {dict(sorted(table.items()))}")


def assert_done(repair: Repair, before: Files, after: Files, what: str) -> None:
    """Assert that a repair did what it says and nothing else."""
    assert set(repair.deleted) == before.keys() - after.keys(), what
    changed = {key for key, data in after.items() if before.get(key) != data}
    assert set(repair.renewed) == changed, what


def test_a_repair_names_the_command_to_run_again(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "tail_ids/c/1/0").unlink()
    (root / "topk_ids/c/9").mkdir()
    (root / "topk_ids/c/9/0").write_text("of no shard")
    begun = files_in(root)
    said = run("repair", root, "--dry-run").output.splitlines()
    assert files_in(root) == begun
    planned = json.loads(run("repair", root, "--dry-run", "--json").stdout)
    found = json.loads(run("repair", root, "--json").stdout)
    assert {**planned, "dry_run": False} == found
    assert said[0] == "would delete commits/000001.json"
    assert [line.removeprefix("would delete ") for line in said if "delete" in line] == found["deleted"]
    assert [line.split()[2] for line in said if line.startswith("would write")] == found["renewed"]
    assert found["renewed"] == ["cache.json", "zarr.json"]
    assert said[-1] == "run the capture of source fake again: it writes shard 1"
    assert found["shards"] == [1]
    assert run("repair", root).output == f"{said[-1]}\n"


def test_wrong_contents_with_correct_checksums_are_redone(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    forge_rows(root, "label_logprob", lambda rows: rows.__setitem__(0, 1), shard=1)
    assert repair_cache(root).shards == (1,)
    assert files_in(write_cache(root)) == whole
    forge_table(root, "num_targets", lambda values: values.__setitem__(0, values[0] + 1))
    assert repair_cache(root).shards == (0,)
    assert files_in(write_cache(root)) == whole


def test_a_damaged_root_is_restored_and_damaged_shards_are_deleted(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    (root / "cache.json").write_bytes(whole["cache.json"][:-9])
    assert repair_cache(root) == Repair(renewed=("cache.json",))
    assert files_in(root) == whole
    (root / "cache.json").unlink()
    (root / "topk_ids/c/1/0").unlink()
    planned = repair_cache(root, dry_run=True)
    assert planned == repair_cache(root)
    assert (planned.shards, planned.renewed) == ((1,), ("cache.json", "zarr.json"))
    assert files_in(write_cache(root)) == whole


def test_a_root_that_is_lost_with_its_copy_is_beyond_repair(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "cache.json").write_bytes(b"[]")
    (root / "zarr.json").unlink()
    (root / "topk_ids/c/0/0").unlink()
    begun = files_in(root)
    assert run("repair", root, code=1).output.startswith("not repaired: cache.json: ")
    assert files_in(root) == begun
    with pytest.raises(CacheFormatError, match="not a cache"):
        repair_cache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_root_of_another_version_is_left_as_it_is(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    values = json.loads((root / "cache.json").read_text())
    del values["crc32c"]
    values["manifest"]["format_version"] = 3
    values["crc32c"] = google_crc32c.value(json.dumps(values, separators=(",", ":")).encode())
    (root / "cache.json").write_text(json.dumps(values))
    begun = files_in(root)
    with pytest.raises(CacheFormatError, match="version 3"):
        repair_cache(root)
    assert files_in(root) == begun


def test_a_damaged_tokenizer_is_taken_out_and_written_again_by_the_capture(tmp_path: Path) -> None:
    chosen, root = settings(), tmp_path / "cache"

    def capture() -> None:
        with CacheWriter(root, manifest(chosen), "{}") as writer:
            for shard in writer.missing_shards():
                writer.write_shard(shard, [sequence(0, chosen)])
            writer.seal()

    capture()
    whole = files_in(root)
    (root / "tokenizer.json").write_bytes(b"[]")
    assert repair_cache(root).deleted == ("tokenizer.json",)
    assert verify_cache(root) == []
    capture()
    assert files_in(root) == whole


def test_a_cache_that_is_being_written_is_not_touched(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/c/1/0").unlink()
    begun = files_in(root)
    with LocalStore(root).lock():
        with pytest.raises(CacheLockedError):
            repair_cache(root)
        assert repair_cache(root, dry_run=True).shards == (1,)
    assert files_in(root) == begun


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_unreadable_objects_are_not_deleted(tmp_path: Path, quick_disk: None, step: int) -> None:
    """A disk that fails once at any read: a repair fails, or leaves all that is whole."""
    root = write_cache(tmp_path / "cache", per_shard=2)
    (root / "label_logprob/c/0").write_bytes(b"nothing")
    begun = files_in(root)
    with FailingReads(root) as reads:
        repair_cache(root, dry_run=True)
    for at in range(1, reads.count + 1, step):
        copy = tmp_path / "copy"
        shutil.copytree(root, copy)
        with contextlib.suppress(CacheError), FailingReads(copy, at, (errno.EIO, errno.EACCES)[at % 2]) as failing:
            assert set(repair_cache(copy).shards) <= {0}, failing.asked
        after = files_in(copy)
        assert not [key for key in begun if "/000001" in key and after.get(key) != begun[key]], failing.asked
        assert not [key for key in begun if "/c/1" in key and after.get(key) != begun[key]], failing.asked
        shutil.rmtree(copy)


def capture_part(root: Path, part: int, stop_after: int | None = None) -> Path:
    """Capture one of two parts, of two shards each, or `stop_after` so many shards; what is there is gone on with."""
    chosen = settings()
    first = manifest(chosen, 2, 2)
    both = dataclasses.replace(first, parts=(*first.parts, dataclasses.replace(first.parts[0], content="d")))
    with CacheWriter(root, (first, both)[part]) as writer:
        for shard in writer.missing_shards()[:stop_after]:
            writer.write_shard(shard, [fake_cache.sequence(shard, chosen)])
        if stop_after is None:
            writer.seal()
    return root


def test_an_append_that_was_stopped_is_no_damage_and_damage_to_it_leaves_the_cache_whole(tmp_path: Path) -> None:
    whole = files_in(capture_part(capture_part(tmp_path / "whole", 0), 1))
    root = capture_part(capture_part(tmp_path / "cache", 0), 1, stop_after=1)
    assert [(problem.where, problem.is_note) for problem in verify_cache(root)] == [("cache.json", True)]
    assert (repair_cache(root).deleted, repair_cache(root).renewed) == ((), ())
    (root / "topk_ids/c/2/0").write_bytes(b"nothing")
    repair = repair_cache(root)
    assert (repair.shards, repair.lost, [part.content for part in repair.parts]) == ((2,), (), ["d"])
    assert len(open_cache(root)) == 2
    assert files_in(capture_part(root, 1)) == whole


def test_damage_in_a_cache_with_an_append_is_repaired_by_either_capture(tmp_path: Path) -> None:
    whole = files_in(capture_part(capture_part(tmp_path / "whole", 0), 1))
    root = capture_part(capture_part(tmp_path / "cache", 0), 1, stop_after=1)
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    repair = repair_cache(root)
    assert (repair.shards, repair.lost, [part.content for part in repair.parts]) == ((1,), (1,), ["c", "d"])
    assert files_in(capture_part(root, 1)) == whole


def test_an_append_can_be_given_up(tmp_path: Path) -> None:
    root = capture_part(tmp_path / "cache", 0)
    whole = files_in(root)
    capture_part(root, 1, stop_after=1)
    (root / "topk_ids/c/3").mkdir()
    (root / "topk_ids/c/3/0").write_bytes(b"half of the next shard")
    assert "would give up the capture of source fake" in run("repair", root, "--abandon", "--dry-run").output
    assert "is whole" in run("repair", root, "--abandon").output
    assert files_in(root) == whole
    assert repair_cache(root, abandon=True) == Repair()
    begun = write_cache(tmp_path / "begun", seal=False)
    with pytest.raises(CacheMismatchError, match="nothing would be left"):
        repair_cache(begun, abandon=True)


class Killed(BaseException):
    """Nothing runs after this, and nothing is cleaned up."""


def damage(root: Path) -> Path:
    """Damage a cache in all ways that a repair can mend at once; an append has begun, and is to be given up."""
    capture_part(capture_part(root, 0), 1, stop_after=1)
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    (root / "tokenizer.json").write_bytes(b"not named by the root")
    (root / "sealed.json").write_bytes(b"of format 1")
    (root / "topk_ids/zarr.json").unlink()
    return root


@pytest.mark.parametrize("abandon", [False, True])
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_repair_that_is_killed_at_any_operation_and_run_again_ends_the_same(
    tmp_path: Path, quick_disk: None, step: int, abandon: bool
) -> None:
    root = damage(tmp_path / "cache")
    mended = tmp_path / "mended"
    shutil.copytree(root, mended)
    with Watch(mended) as watch:
        repair_cache(mended, abandon=abandon)
    captured = files_in(mended)
    for at in range(1, len(watch.log) + 1, step):
        copy, count = tmp_path / "copy", 0
        shutil.copytree(root, copy)

        def before(_: Operation) -> None:
            nonlocal count
            count += 1
            if count >= at:  # noqa: B023 -- used within this round only
                raise Killed

        with Watch(copy, before), contextlib.suppress(Killed):
            repair_cache(copy, abandon=abandon)
        left = tmp_path / "left"
        shutil.copytree(copy, left)
        repair_cache(copy, abandon=abandon)
        assert {key: data for key, data in files_in(copy).items() if key != ".lock"} == captured, at
        # A capture that is run instead takes no damaged shard for a whole one.
        with contextlib.suppress(CacheError):
            capture_part(left, 0)
        damaged = (left / "topk_ids/c/1/0").exists() and (left / "topk_ids/c/1/0").read_bytes() == b"nothing"
        assert not damaged or any(not problem.is_note for problem in verify_cache(left)), at
        shutil.rmtree(copy)
        shutil.rmtree(left)
