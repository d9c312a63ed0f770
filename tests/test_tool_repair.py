"""Repair deletes what is damaged and no more, so that the same capture recomputes just that."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from support.damage import KINDS, Files
from support.fake_cache import forge_rows, forge_table, manifest, sequence, settings, write_cache
from support.tools import run

from todi_offline.cache.check.repair import Repair, repair_cache
from todi_offline.cache.check.verify import object_keys, verify_cache
from todi_offline.cache.format.names import record_key
from todi_offline.cache.objects import committed_shards, read_record
from todi_offline.cache.reader import open_cache, read_manifest
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheFormatError, CacheLockedError, CacheMismatchError


def files_in(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shards_with(root: Path, keys: set[str]) -> set[int]:
    """Return the shards that these objects are of, their records included."""
    manifest = read_manifest(LocalStore(root))
    return {shard for shard in range(manifest.num_shards) if keys & {record_key(shard), *object_keys(manifest, shard)}}


def test_a_whole_cache_is_left_as_it_is(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    assert repair_cache(root) == Repair((), (), (), (), is_sealed=True)
    assert files_in(root) == whole
    assert run("repair", root).output == f"{root} is whole\n"


def test_what_is_not_finished_is_no_damage(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=3, seal=False)
    (root / "commits/000002.json").unlink()
    (root / "topk_ids/c/2/0.tmp").write_bytes(b"half")
    begun = files_in(root)
    assert repair_cache(root) == Repair((), (), (), (), is_sealed=False)
    assert files_in(root) == begun
    assert run("repair", root).output == "to go on, run what wrote it again: it finishes the cache\n"


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_random_damage_just_that_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what takes the time, and not what is looked at
    shape = {"num_shards": 3, "per_shard": 4}
    root, other = write_cache(tmp_path / "cache", **shape), write_cache(tmp_path / "other", num_shards=3, per_shard=5)
    whole, copy, table = files_in(root), tmp_path / "copy", Counter[str]()
    for number, kind in zip(range(count), cycle(KINDS)):
        shutil.copytree(root, copy)
        what = f"{kind.__name__} of {kind(copy, np.random.default_rng(number), other)}, damage {number}"
        before = files_in(copy)
        damaged = {key for key in {*whole, *before} if before.get(key) != whole.get(key)}
        repair = repair_cache(copy)
        if repair.left:  # of manifest and seal, nothing tells which is wrong
            assert damaged & {"zarr.json", "sealed.json"}, what
            assert files_in(copy) == before, what
            table["nothing deleted"] += 1
        else:
            assert not repair.left, what
            assert set(repair.shards) == shards_with(root, damaged), what
            assert set(repair.shards) == {0, 1, 2} - set(committed_shards(LocalStore(copy))), what
            assert files_in(write_cache(copy, **shape)) == whole, what
            table[f"{len(repair.shards)} shards made anew"] += 1
        shutil.rmtree(copy)
    print(f"\n{count} damages: {dict(sorted(table.items()))}")


def test_of_an_unfinished_cache_only_damaged_bytes_are_deleted(tmp_path: Path) -> None:
    """Its manifest has no checksum: where that is what is damaged, every shard seems to be."""
    root = write_cache(tmp_path / "cache", num_shards=3, seal=False)
    whole = files_in(root)
    (root / "zarr.json").write_text((root / "zarr.json").read_text().replace('"vocab_size": 300', '"vocab_size": 200'))
    changed = files_in(root)
    repair = repair_cache(root)
    assert len(verify_cache(root)) > 3
    assert (repair.deleted, repair.shards) == ((), ())
    assert {problem.remedy.shard for problem in repair.left} == {0, 1, 2}
    assert files_in(root) == changed
    (root / "zarr.json").write_bytes(whole["zarr.json"])
    (root / "label_logprob/c/1").write_bytes(b"nothing")
    assert repair_cache(root).shards == (1,)
    assert files_in(write_cache(root, num_shards=3, seal=False)) == whole


def test_contents_that_are_wrong_behind_right_checksums_are_made_anew(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    forge_rows(root, "label_logprob", lambda rows: rows.__setitem__(0, 1), shard=1)
    assert repair_cache(root).shards == (1,)
    assert files_in(write_cache(root)) == whole
    forge_table(root, "num_targets", lambda values: values.__setitem__(0, values[0] + 1))
    assert repair_cache(root).shards == (0,)
    assert files_in(write_cache(root)) == whole


def test_a_seal_that_is_wrong_of_a_whole_record_costs_no_shard(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    seal = json.loads((root / "sealed.json").read_text())
    seal["objects"]["commits/000001.json"][1] += 1
    (root / "sealed.json").write_text(json.dumps(seal, indent=1) + "\n")
    (root / "stray").write_text("")
    (first, second) = verify_cache(root)
    assert (second.where, second.what) == ("sealed.json", "it has another sum of commits/000001.json, which is whole")
    repair = repair_cache(root)
    assert (repair.deleted, repair.shards, repair.is_sealed) == (("sealed.json",), (), False)
    assert repair.left == (first,), "what a wrong seal does not name may be what it should"
    write_cache(root)
    assert repair_cache(root).deleted == ("stray",)
    assert files_in(root) == whole


def test_a_record_that_is_whole_json_but_not_what_was_written_costs_its_shard(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    path = root / "commits/000001.json"
    path.write_text(path.read_text() + "\n")
    assert read_record(LocalStore(root), "commits/000001.json").shard == 1
    assert repair_cache(root).shards == (1,)


def test_a_dry_run_deletes_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "tail_ids/c/1/0").unlink()
    (root / "stray").write_text("")
    begun = files_in(root)
    said = run("repair", root, "--dry-run").output.splitlines()
    assert files_in(root) == begun
    found = json.loads(run("repair", root, "--json").stdout)
    assert set(begun) - set(found["deleted"]) == set(files_in(root))
    assert said[:2] == ["would delete sealed.json", "would delete commits/000001.json"]
    assert [line.removeprefix("would delete ") for line in said[:-1]] == found["deleted"]
    assert said[-1] == "to go on, run what wrote it again (source fake): it makes anew shard 1"
    assert (found["dry_run"], found["shards"], found["is_sealed"]) == (False, [1], False)


def test_a_lost_manifest_is_said_to_be_beyond_repair(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "zarr.json").unlink()
    (root / "topk_ids/c/0/0").unlink()
    begun = files_in(root)
    said = run("repair", root, code=1).output
    assert said.startswith("left as it is: zarr.json: ")
    assert said.endswith("to mend it: bring it back from a copy, or capture into another folder\n")
    assert files_in(root) == begun
    with pytest.raises(CacheFormatError, match="is no cache"):
        repair_cache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_manifest_and_seal_that_differ_are_left_to_the_capture(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    whole = files_in(root)
    seal = json.loads((root / "sealed.json").read_text())
    seal["objects"]["zarr.json"][1] += 1
    (root / "sealed.json").write_text(json.dumps(seal, indent=1) + "\n")
    assert "or delete sealed.json: the same capture tells which is right" in run("repair", root, code=1).output
    assert len(files_in(root)) == len(whole)
    (root / "sealed.json").unlink()
    assert files_in(write_cache(root)) == whole
    (root / "zarr.json").write_text((root / "zarr.json").read_text().replace("fake", "fale"))
    assert repair_cache(root).deleted == ()
    (root / "sealed.json").unlink()
    with pytest.raises(CacheMismatchError, match="'fale' in the cache, 'fake' now"):
        write_cache(root)


def test_a_cache_that_is_being_written_is_not_touched(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "stray").write_text("")
    with LocalStore(root).lock():
        with pytest.raises(CacheLockedError):
            repair_cache(root)
        assert repair_cache(root, dry_run=True).deleted == ("stray",)
    assert (root / "stray").exists()


def capture_part(root: Path, part: int, stop_after: int | None = None) -> Path:
    """Capture one of two parts, of two shards each, or `stop_after` so many shards; what is there is gone on with."""
    chosen = settings()
    first = manifest(chosen, 2, 2)
    both = dataclasses.replace(first, parts=(*first.parts, dataclasses.replace(first.parts[0], content="d")))
    with CacheWriter(root, (first, both)[part]) as writer:
        for shard in writer.missing_shards()[:stop_after]:
            writer.write_shard(shard, [sequence(shard, chosen)])
        if stop_after is None:
            writer.seal()
    return root


def test_an_append_that_was_stopped_is_no_damage_and_damage_to_it_costs_no_seal(tmp_path: Path) -> None:
    whole = files_in(capture_part(capture_part(tmp_path / "whole", 0), 1))
    root = capture_part(capture_part(tmp_path / "cache", 0), 1, stop_after=1)
    assert verify_cache(root) == []
    assert repair_cache(root) == Repair((), (), (), (), is_sealed=True)
    (root / "topk_ids/c/2/0").write_bytes(b"nothing")
    repair = repair_cache(root)
    assert (repair.shards, repair.is_sealed, len(repair.parts)) == ((2,), True, 1)
    assert repair.parts[0].content == "d"
    assert len(open_cache(root)) == 2
    assert files_in(capture_part(root, 1)) == whole


def test_damage_to_what_is_appended_to_is_mended_before_the_append_goes_on(tmp_path: Path) -> None:
    whole = files_in(capture_part(capture_part(tmp_path / "whole", 0), 1))
    root = capture_part(capture_part(tmp_path / "cache", 0), 1, stop_after=1)
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    repair = repair_cache(root)
    assert (repair.shards, repair.is_sealed, repair.parts[0].content) == ((1,), False, "c")
    assert len(open_cache(capture_part(root, 0))) == 2
    assert files_in(capture_part(root, 1)) == whole


def test_an_append_that_was_stopped_between_manifest_and_seal_is_no_damage(tmp_path: Path) -> None:
    whole = files_in(capture_part(capture_part(tmp_path / "whole", 0), 1))
    root = capture_part(capture_part(tmp_path / "cache", 0), 1, stop_after=2)
    (root / "zarr.json").write_bytes((root / "append.json").read_bytes())
    (problem,) = verify_cache(root)
    assert (problem.where, problem.remedy.drop) == ("sealed.json", ())
    assert repair_cache(root).deleted == ()
    (root / "label_logprob/c/3").unlink()
    assert repair_cache(root).shards == (3,)
    assert files_in(capture_part(root, 1)) == whole
