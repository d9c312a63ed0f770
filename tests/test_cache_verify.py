"""Verify finds what is wrong, says where and how to mend it, and finds nothing in a whole cache."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.fake_cache import forge, forge_rows, forge_table, manifest, sequence, settings, write_cache

from todi_offline.cache.check.problems import Problem, Remedy
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheFormatError


def problems(root: Path) -> list[Problem]:
    return verify_cache(root)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_whole_cache_has_no_problem(tmp_path: Path, codec: str, encoding: str) -> None:
    assert problems(write_cache(tmp_path / "cache", codec=codec, encoding=encoding)) == []
    assert problems(write_cache(tmp_path / "plain", codec=codec, encoding=encoding, tail_samples=0)) == []


def test_a_problem_says_where_what_and_how_to_mend_it_and_that_mends_it(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    (found,) = problems(root)
    assert found.where == "topk_ids/c/1/0"
    assert "it has 7 bytes" in found.what
    assert found.remedy.text == "`todi-cache repair`, then the same capture again: it redoes shard 1 alone"
    assert (found.remedy.drop, found.remedy.shard) == (("sealed.json", "commits/000001.json"), 1)
    (root / "commits/000001.json").unlink()
    (root / "sealed.json").unlink()
    assert problems(write_cache(root)) == []


def test_damaged_chunks_are_named_with_the_sequences_that_they_hold(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=40)
    path = root / "topk_ids/c/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    (found,) = problems(root)
    assert found.where == "topk_ids/c/0/0"
    assert "damaged are the chunks [0], of the sequences 'fake:0', 'fake:1', 'fake:2', 'fake:3' and" in found.what
    path.write_bytes(data[:-1])
    (found,) = problems(root)
    assert "its chunk index is lost" in found.what


def test_of_an_unsealed_cache_the_committed_part_is_checked(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "commits/000001.json").unlink()
    (found,) = problems(root)
    assert found.where == "sealed.json"
    assert "is not sealed" in found.what
    (root / "token_ids/c/1").unlink()
    assert len(problems(root)) == 1
    (root / "token_ids/c/0").unlink()
    assert [problem.where for problem in problems(root)] == ["sealed.json", "token_ids/c/0"]


def test_a_cache_whose_manifest_is_lost_is_told_from_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="is no cache"):
        verify_cache(tmp_path)
    root = write_cache(tmp_path / "cache")
    group = json.loads((root / "zarr.json").read_text())
    (root / "zarr.json").unlink()
    (found,) = problems(root)
    assert found.where == "zarr.json"
    assert found.remedy == Remedy("bring it back from a copy, or capture into another folder")
    group["attributes"]["todi_offline"]["format_version"] = 2
    (root / "zarr.json").write_text("")
    forge(root, "zarr.json", json.dumps(group).encode())
    with pytest.raises(CacheFormatError, match="is of format version 2, this release reads version 1"):
        verify_cache(root)


def test_a_lost_tokenizer_is_one_problem(tmp_path: Path) -> None:
    chosen, root = settings(), tmp_path / "cache"
    with CacheWriter(root, manifest(chosen), "{}") as writer:
        writer.write_shard(0, [sequence(0, chosen)])
        writer.seal()
    assert problems(root) == []
    (root / "tokenizer.json").unlink()
    assert [problem.where for problem in problems(root)] == ["tokenizer.json"]


@pytest.mark.parametrize("key", ["topk_ids/zarr.json", "commits/000001.json", "sequences/000001.parquet"])
def test_following_the_remedy_mends_what_is_lost(tmp_path: Path, key: str) -> None:
    root = write_cache(tmp_path / "cache")
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (root / key).unlink()
    (found,) = problems(root)
    assert found.where == key
    assert "the same capture again" in found.remedy.text
    for name in found.remedy.drop:
        (root / name).unlink(missing_ok=True)
    write_cache(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == whole


def test_leftovers_of_a_killed_writer_are_named_but_its_lock_is_none(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / ".lock").write_text("process 1 on nowhere")
    (root / "empty").mkdir()
    assert problems(root) == []
    (root / "topk_ids/c/0/0.tmp").write_bytes(b"half")
    (root / "topk_ids/c/2").mkdir()
    (root / "topk_ids/c/2/0").write_bytes(b"of no shard")
    assert [(problem.where, problem.remedy.drop) for problem in problems(root)] == [
        ("topk_ids/c/0/0.tmp", ("topk_ids/c/0/0.tmp",)),
        ("topk_ids/c/2/0", ("topk_ids/c/2/0",)),
    ]


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


def test_what_no_sequence_owns_must_be_zero(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    for name in ("token_ids", "target_mask", "topk_ids", "label_logprob"):
        copy = tmp_path / name
        shutil.copytree(root, copy)
        forge_rows(copy, name, lambda rows: rows[-1:].fill(1))
        (found,) = problems(copy)
        assert found.where.startswith(f"{name}/c/0")
        assert "that no sequence owns are not 0" in found.what


def test_tables_that_disagree_with_rows_or_records_are_found_behind_right_checksums(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")

    def put(index: int, change: object) -> object:
        return lambda values: values.__setitem__(index, change(values[index]) if callable(change) else change)

    for number, (column, change, message) in enumerate(
        [
            ("shard", put(0, 1), "the sequence table of shard 0 of"),
            ("token_start", put(1, lambda start: start + 1), "overlap or leave gaps on the token axis"),
            ("target_start", put(1, lambda start: start - 1), "overlap or leave gaps on the target axis"),
            ("num_targets", put(11, lambda count: count - 1), "sequences, tokens and targets, the record"),
            ("content_key", put(2, bytes(16)), "its content keys are not those of the commit record"),
            ("teacher_nll", put(2, lambda nll: nll + 0.01), "its teacher NLL in the table is not that of its rows"),
            ("teacher_nll", put(2, float("nan")), "its teacher NLL in the table is not that of its rows"),
            ("topk_mass", put(2, lambda mass: mass - 0.01), "its mean top-k mass in the table is not that of its rows"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(root, copy)
        forge_table(copy, column, change)  # type: ignore[arg-type]
        assert any(message in problem.what for problem in problems(copy)), (message, problems(copy))


def test_tokens_and_masks_that_disagree_with_the_table_are_found_behind_right_checksums(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    first, last = 0, len(sequence(0, settings()).token_ids) - 1
    for number, (name, where, value, message) in enumerate(
        [
            ("token_ids", first, 300, "token ids beyond the vocabulary of 300"),
            ("token_ids", first, 299, "do not give its content key"),
            ("target_mask", first, 2, "other values than 0 and 1"),
            ("target_mask", first, 0, "positions, the table has"),
            ("target_mask", last, 1, "supervises the last position"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(root, copy)
        forge_rows(copy, name, lambda rows, where=where, value=value: rows.__setitem__(where, value))  # type: ignore[misc]
        found = problems(copy)
        assert {problem.where for problem in found} == {"sequence 'fake:0'"}
        assert any(message in problem.what for problem in found), (message, found)


def test_metadata_and_records_that_disagree_are_found_behind_right_checksums(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    metadata = json.loads((root / "topk_ids/zarr.json").read_text())
    forge(root, "topk_ids/zarr.json", json.dumps(metadata | {"shape": [4096, 6]}).encode())
    assert [(problem.where, problem.what) for problem in problems(root)] == [
        ("topk_ids/zarr.json", "it is not what the manifest leads to")
    ]
    forge(root, "topk_ids/zarr.json", b"[")
    assert [problem.where for problem in problems(root)] == ["topk_ids/zarr.json"]
    forge(root, "topk_ids/zarr.json", json.dumps(metadata).encode())
    assert problems(root) == []
    table = (root / "sequences/000001.parquet").read_bytes()
    forge(root, "sequences/000001.parquet", b"no table")
    assert [(problem.where, problem.what.split(": ")[0]) for problem in problems(root)] == [
        ("shard 1", f"{root / 'sequences/000001.parquet'} cannot be read")
    ]
    forge(root, "sequences/000001.parquet", table)
    forge(root, "commits/000001.json", (root / "commits/000000.json").read_bytes())
    assert any("000001.json is not the record of shard 1" in problem.what for problem in problems(root))


def test_a_seal_in_other_bytes_is_found(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    with (root / "sealed.json").open("a") as file:
        file.write(" ")
    assert [problem.where for problem in problems(root)] == ["sealed.json"]


def with_rows(tmp_path: Path, **changes: object) -> list[str]:
    """Write a cache of one sequence whose targets are changed, and return what verify says of it."""
    import dataclasses

    chosen = settings()
    good = sequence(3, chosen)
    rows: TargetRows = dataclasses.replace(good.targets, **changes)  # type: ignore[arg-type]
    bad = SequenceRows(good.id, good.source, good.token_ids, good.target_mask, rows)
    with CacheWriter(tmp_path / "cache", manifest(chosen)) as writer:
        writer.write_shard(0, [bad])
        writer.seal()
    return [problem.what for problem in problems(tmp_path / "cache")]


def test_wrong_contents_are_found_behind_right_checksums(tmp_path: Path) -> None:
    rows = sequence(3, settings()).targets
    first = rows.ids.copy()
    first[0, 1] = first[0, 0]
    beyond = rows.ids.copy()
    beyond[1, 2] = 300
    rising = rows.logprobs[:, ::-1].copy()
    nan = rows.label_logprob.copy()
    nan[0] = np.nan
    moved = np.roll(rows.label_logprob, 1)
    assert rows.tail_ids is not None
    kept = rows.ids[:, :3].copy()
    for number, (changes, message) in enumerate(
        [
            ({"ids": first}, "ids that repeat"),
            ({"ids": beyond}, "beyond the vocabulary of 300"),
            ({"logprobs": rising}, "do not fall"),
            ({"logprobs": rows.logprobs / 2}, "kept mass is above 1"),
            ({"tail_logsumexp": rows.tail_logsumexp - 1}, "kept and tail mass differ from 1"),
            ({"label_logprob": nan}, "NaN"),
            ({"label_logprob": moved}, "not that of the same id"),
            ({"tail_ids": kept}, "a tail sample is a kept id"),
        ]
    ):
        found = with_rows(tmp_path / str(number), **changes)
        assert any(message in what for what in found), (message, found)


def test_a_seal_that_lies_about_counts_is_found(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    seal = json.loads((root / "sealed.json").read_text())
    (root / "sealed.json").write_text(json.dumps(seal | {"num_targets": seal["num_targets"] + 1}))
    assert any("other numbers of sequences" in problem.what for problem in problems(root))
