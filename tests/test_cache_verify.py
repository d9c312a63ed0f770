"""Verify finds each fault, names its place and its repair, and finds nothing in an intact cache."""

import contextlib
import dataclasses
import errno
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from support.disk import FailingReads
from support.fake_cache import forge, forge_rows, forge_table, manifest, sequence, settings, write_cache, write_foreign
from support.tools import run

from todi_offline.cache.check.problems import GO_ON, NOTHING, READ_AGAIN, RENEW, RESTORE, Problem, redo
from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.format.shard import chunk_sums, encode_shard
from todi_offline.cache.objects import read_record, read_root
from todi_offline.cache.reader import open_cache
from todi_offline.cache.shard_file import ShardFile
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter, replace_root, write_derived_metadata
from todi_offline.errors import CacheError, CacheFormatError


def problems(root: Path) -> list[Problem]:
    return verify_cache(root)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_whole_cache_has_no_problem(tmp_path: Path, codec: str, encoding: str) -> None:
    assert problems(write_cache(tmp_path / "cache", codec=codec, encoding=encoding)) == []
    assert problems(write_cache(tmp_path / "plain", codec=codec, encoding=encoding, tail_samples=0)) == []


def test_a_problem_names_its_place_its_kind_and_its_repair(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    (found,) = problems(root)
    assert (found.where, found.is_note) == ("topk_ids/c/1/0", False)
    assert "it has 7 bytes" in found.what
    assert found.remedy == redo(1)


def test_damaged_chunks_are_named_with_the_sequences_that_they_hold(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=40)
    path = root / "topk_ids/c/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    (found,) = problems(root)
    assert found.where == "topk_ids/c/0/0"
    assert "the chunks [0] are damaged, of the sequences 'fake:0', 'fake:1', 'fake:2', 'fake:3' and" in found.what
    path.write_bytes(data[:-1])
    (found,) = problems(root)
    assert "its chunk index is lost" in found.what


def test_of_an_unfinished_cache_the_committed_part_is_checked(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits/000001.json").unlink()
    (found,) = problems(root)
    assert (found.where, found.remedy) == ("cache.json", GO_ON)
    (root / "token_ids/c/1").unlink()
    assert len(problems(root)) == 1
    (root / "token_ids/c/0").unlink()
    assert [problem.where for problem in problems(root)] == ["cache.json", "token_ids/c/0"]


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="is not a cache"):
        verify_cache(tmp_path)
    (tmp_path / "cache.json").write_text("{}")  # of another program
    with pytest.raises(CacheFormatError, match="not the root"):
        verify_cache(tmp_path)


DAMAGED_ROOTS = {
    "lost": None,
    "cut": lambda data: data[:-100],
    "flipped": lambda data: data.replace(b'"fake"', b'"fale"'),
    "no object": lambda data: b"[]",
    "another version": lambda data: data.replace(b'"format_version": 2', b'"format_version": 3'),
    "other bytes": lambda data: data + b" ",
}


@pytest.mark.parametrize("damage", DAMAGED_ROOTS.values(), ids=DAMAGED_ROOTS)
def test_a_damaged_root_can_be_restored_and_the_rest_is_checked_by_its_copy(
    tmp_path: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    root = write_cache(tmp_path / "cache")
    path = root / "cache.json"
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    assert [(problem.where, problem.remedy) for problem in problems(root)] == [("cache.json", RENEW)]
    (root / "token_ids/c/1").unlink()
    assert [problem.where for problem in problems(root)] == ["cache.json", "token_ids/c/1"]


def test_a_root_that_is_damaged_with_its_copy_is_beyond_repair(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "cache.json").write_bytes(b"[]")
    (root / "zarr.json").unlink()
    assert [(problem.where, problem.remedy) for problem in problems(root)] == [("cache.json", RESTORE)]
    (root / "cache.json").unlink()
    assert [problem.remedy for problem in problems(root)] == [RESTORE]


def test_a_sound_root_of_another_version_is_no_damage(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    values = json.loads((root / "cache.json").read_text())
    del values["crc32c"]
    values["manifest"]["format_version"] = 3
    values["crc32c"] = google_crc32c.value(json.dumps(values, separators=(",", ":")).encode())
    (root / "cache.json").write_text(json.dumps(values))
    with pytest.raises(CacheFormatError, match="version 3"):
        verify_cache(root)


def test_a_lost_tokenizer_is_one_problem(tmp_path: Path) -> None:
    chosen, root = settings(), tmp_path / "cache"
    with CacheWriter(root, manifest(chosen), "{}") as writer:
        writer.write_shard(0, [sequence(0, chosen)])
        writer.seal()
    assert problems(root) == []
    (root / "tokenizer.json").unlink()
    assert [problem.where for problem in problems(root)] == ["tokenizer.json"]


def test_foreign_files_and_a_nested_cache_are_notes(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    write_foreign(root)
    found = problems(root)
    assert {(problem.is_note, problem.remedy) for problem in found} == {(True, NOTHING)}
    named = {".git", "README.md", "run", "commits/0.json", "topk_ids/notes.txt", "x.tmp", "nested"}
    assert {problem.where for problem in found} == named
    assert "is whole" in run("verify", root).output
    (root / "nested/token_ids/c/0").unlink()
    assert problems(root) == found


def test_leftovers_of_a_killed_writer_are_notes_but_its_lock_is_none(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / ".lock").write_text("process 1 on nowhere")
    (root / "empty").mkdir()
    assert problems(root) == []
    leftovers = ["commits/000002.json", "sealed.json", "topk_ids/c/0/0.0123456789abcdef.tmp", "topk_ids/c/2/0"]
    for key in leftovers:
        (root / key).parent.mkdir(exist_ok=True)
        (root / key).write_bytes(b"half")
    found = problems(root)
    assert [(problem.where, problem.remedy.drop, problem.is_note) for problem in found] == [
        (key, (key,), True) for key in leftovers
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_foreign_folder_that_cannot_be_listed_is_a_note(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "lost+found").mkdir(mode=0)
    assert [(problem.where, problem.is_note) for problem in problems(root)] == [("lost+found", True)]


def test_a_shard_that_was_lost_and_captured_again_is_checked_before_it_is_sealed(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    run("repair", root)
    assert [problem.remedy for problem in problems(root)] == [GO_ON]
    write_cache(root, seal=False)
    (root / "label_logprob/c/1").write_bytes(b"nothing")
    assert [problem.remedy for problem in problems(root)] == [GO_ON, redo(1)]


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    peaks = []
    for num_shards in (2, 2, 8):  # the first fills what is cached
        root = write_cache(tmp_path / f"{num_shards} {len(peaks)}", num_shards=num_shards, per_shard=4)
        tracemalloc.start()
        assert problems(root) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.15 * peaks[1], peaks


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    verify_cache(write_cache(tmp_path / "cache"), lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("name", ["token_ids", "target_mask", "topk_ids", "label_logprob"])
def test_rows_without_a_sequence_must_be_zero(tmp_path: Path, name: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1)
    with_surplus_row(root, name)
    (found,) = problems(root)
    assert found.where.startswith(f"{name}/c/0")
    assert "that belong to no sequence are not 0" in found.what


def with_surplus_row(root: Path, name: str) -> None:
    """Write a number behind the last row that a sequence owns."""
    store = LocalStore(root)
    manifest = read_root(store).manifest
    record, spec = read_record(store, manifest, 0, None), manifest.arrays[name]
    num_rows = record.num_tokens if spec.axis == "token" else record.num_targets
    file = ShardFile(root / spec.object_key(0), spec, manifest.settings.codec)
    rows = file.read_rows(0, num_rows + 1).copy()
    rows[num_rows:] = 1
    data = encode_shard(spec, rows, manifest.settings.codec)
    forge(root, spec.object_key(0), data, chunk_sums(spec, data))


def put(index: int, change: Any) -> Callable[[list[Any]], None]:
    def changed(values: list[Any]) -> None:
        values[index] = change(values[index]) if callable(change) else change

    return changed


FORGED_TABLES = [
    ("shard", put(0, 1), "names other shards"),
    ("token_start", put(1, lambda start: start + 1), "overlap or leave gaps on the token axis"),
    ("target_start", put(1, lambda start: start - 1), "overlap or leave gaps on the target axis"),
    ("num_targets", put(11, lambda count: count - 1), "sequences, tokens and targets; the commit record"),
    ("content_key", put(2, bytes(16)), "its content keys are not those of the commit record"),
    ("teacher_nll", put(2, lambda nll: nll + 0.01), "its teacher NLL in the table"),
    ("teacher_nll", put(2, float("nan")), "its teacher NLL in the table"),
    ("topk_mass", put(2, lambda mass: mass - 0.01), "its mean top-k mass in the table"),
]


@pytest.mark.parametrize(("column", "change", "message"), FORGED_TABLES, ids=[each[2] for each in FORGED_TABLES])
def test_a_table_that_disagrees_with_rows_or_record_is_found_behind_right_checksums(
    tmp_path: Path, column: str, change: Callable[[list[Any]], None], message: str
) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1)
    forge_table(root, column, change)
    assert any(message in problem.what for problem in problems(root)), problems(root)


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("token_ids", 0, 300, "token ids beyond the vocabulary of 300"),
        ("token_ids", 0, 299, "its content key is not that of its tokens and mask"),
        ("target_mask", 0, 2, "values other than 0 and 1"),
        ("target_mask", 0, 0, "positions, but the table has"),
        ("target_mask", len(sequence(0, settings()).token_ids) - 1, 1, "supervises the last position"),
    ],
)
def test_tokens_and_masks_that_disagree_with_the_table_are_found_behind_right_checksums(
    tmp_path: Path, name: str, where: int, value: int, message: str
) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1)
    forge_rows(root, name, lambda rows: rows.__setitem__(where, value))
    found = problems(root)
    assert {problem.where for problem in found} == {"sequence 'fake:0'"}
    assert any(message in problem.what for problem in found), found


def test_metadata_that_do_not_follow_from_the_root_are_found(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    for key, changes in {"topk_ids/zarr.json": {"shape": [4096, 6]}, "zarr.json": {"attributes": {}}}.items():
        whole = (root / key).read_bytes()
        (root / key).write_text(json.dumps(json.loads(whole) | changes))
        assert [(problem.where, problem.remedy) for problem in problems(root)] == [(key, RENEW)]
        (root / key).write_bytes(b"[")
        assert [(problem.where, problem.remedy) for problem in problems(root)] == [(key, RENEW)]
        (root / key).write_bytes(whole)


def test_metadata_of_another_release_of_zarr_are_a_note(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    path = root / "topk_ids/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_in_zarr_9": None}))
    assert [(problem.where, problem.is_note) for problem in problems(root)] == [("topk_ids/zarr.json", True)]


def test_a_table_or_record_that_is_none_is_found_behind_right_checksums(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    forge(root, "sequences/000001.parquet", b"no table")
    assert [(problem.where, problem.remedy) for problem in problems(root)] == [("sequences/000001.parquet", redo(1))]


def test_a_record_of_another_shard_is_found_behind_right_checksums(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    store = LocalStore(root)
    data = (root / "commits/000000.json").read_bytes()
    (root / "commits/000001.json").write_bytes(data)
    found = read_root(store)
    replace_root(store, dataclasses.replace(found, commits=(found.commits[0], found.commits[0])))
    write_derived_metadata(store, read_root(store))
    (problem,) = problems(root)
    assert (problem.where, problem.remedy) == ("commits/000001.json", redo(1))
    assert "not the commit record of shard 1" in problem.what


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_objects_that_cannot_be_read_are_problems_and_no_damage(tmp_path: Path, step: int) -> None:
    """Every read of a file fails once; all that was found is kept, and no whole shard is called damaged."""
    root = write_cache(tmp_path / "cache", per_shard=2)
    (root / "label_logprob/c/0").write_bytes(b"nothing")
    with FailingReads(root) as reads:
        (known,) = problems(root)
    named, lost = 0, list[str]()
    for at in range(1, reads.count + 1, step):
        cause = (errno.EIO, errno.EACCES)[at % 2]
        with FailingReads(root, at, cause) as failing:
            try:
                found = problems(root)
            except CacheError as error:
                found = [Problem("", str(error), READ_AGAIN), known]
                lost.append(failing.asked)
        unreadable = [problem for problem in found if problem.remedy == READ_AGAIN]
        assert all(os.strerror(cause) in problem.what for problem in unreadable), failing.asked
        assert {problem.remedy for problem in found} <= {known.remedy, READ_AGAIN}, (failing.asked, found)
        assert known in found or "label_logprob" in failing.asked or unreadable, failing.asked
        named += len(unreadable)
    assert named > reads.count / step / 2
    assert all(asked.endswith(("cache.json", "zarr.json")) for asked in lost), lost


def test_a_small_root_that_claims_2_31_shards_costs_no_memory(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=2)
    store = LocalStore(root)
    found = read_root(store)
    part = dataclasses.replace(found.manifest.parts[0], content="d", num_shards=2**31 - 1)
    replace_root(store, dataclasses.replace(found, pending=(part, part)))
    write_derived_metadata(store, read_root(store))
    (root / "commits/000007.json").write_bytes(b"{}")
    actions: list[Callable[[], object]] = [
        lambda: verify_cache(root),
        lambda: open_cache(root),
        lambda: open_cache(root, allow_unsealed=True),
        lambda: repair_cache(root, dry_run=True),
        lambda: repair_cache(root),
        lambda: repair_cache(root, abandon=True),
    ]
    for action in actions:
        tracemalloc.start()
        with contextlib.suppress(CacheError):
            action()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24, peak
    assert problems(root) == []


def with_rows(tmp_path: Path, **changes: object) -> list[str]:
    """Write a cache of one sequence whose targets are changed, and return what verify says of it."""
    chosen = settings()
    good = sequence(3, chosen)
    rows: TargetRows = dataclasses.replace(good.targets, **changes)  # type: ignore[arg-type]
    bad = SequenceRows(good.id, good.source, good.token_ids, good.target_mask, rows)
    with CacheWriter(tmp_path / "cache", manifest(chosen)) as writer:
        writer.write_shard(0, [bad])
        writer.seal()
    return [problem.what for problem in problems(tmp_path / "cache")]


ROWS = sequence(3, settings()).targets
WRONG_ROWS: dict[str, dict[str, Any]] = {
    "ids repeat": {"ids": np.concatenate([ROWS.ids[:, :1], ROWS.ids[:, :1], ROWS.ids[:, 2:]], axis=1)},
    "do not fall": {"logprobs": ROWS.logprobs[:, ::-1].copy()},
    "kept mass is above 1": {"logprobs": ROWS.logprobs / 2},
    "the kept mass and the tail's mass do not add up to 1": {"tail_logsumexp": ROWS.tail_logsumexp - 1},
    "differs from that of the same kept id": {"label_logprob": np.roll(ROWS.label_logprob, 1)},
    "a tail sample is a kept id": {"tail_ids": ROWS.ids[:, :3].copy()},
}


@pytest.mark.parametrize(("message", "changes"), WRONG_ROWS.items(), ids=WRONG_ROWS)
def test_wrong_contents_are_found_behind_right_checksums(tmp_path: Path, message: str, changes: dict[str, Any]) -> None:
    found = with_rows(tmp_path, **changes)
    assert any(message in what for what in found), found


@pytest.mark.parametrize(("name", "value", "message"), [("ids", 300, "vocabulary"), ("label_logprob", np.nan, "NaN")])
def test_numbers_that_no_writer_takes_are_found_behind_right_checksums(
    tmp_path: Path, name: str, value: float, message: str
) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1)
    array = {"ids": "topk_ids"}.get(name, name)
    forge_rows(root, array, lambda rows: rows[1].fill(value) if rows.ndim > 1 else rows.__setitem__(1, value))
    assert any(message in problem.what for problem in problems(root))
