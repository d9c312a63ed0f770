"""Verify finds what is wrong, says where and how to mend it, and finds nothing in a whole cache."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_cache import manifest, sequence, settings, write_cache

from todi_offline.cache.encoding import TargetRows
from todi_offline.cache.layout import CODECS, ENCODINGS
from todi_offline.cache.verify import Problem, verify_cache
from todi_offline.cache.writer import CacheWriter, SequenceRows


def problems(root: Path) -> list[Problem]:
    return list(verify_cache(root))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_whole_cache_has_no_problem(tmp_path: Path, codec: str, encoding: str) -> None:
    assert problems(write_cache(tmp_path / "cache", codec=codec, encoding=encoding)) == []
    assert problems(write_cache(tmp_path / "plain", codec=codec, encoding=encoding, tail_samples=0)) == []


def damage(root: Path, kind: str, rng: np.random.Generator) -> str:
    """Damage one file of a cache at random; return its name."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path, other = (files[number] for number in rng.choice(len(files), 2, replace=False))
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(data[: rng.integers(len(data))])
    elif kind == "append":
        path.write_bytes(data + rng.bytes(rng.integers(1, 50)))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        if data == other.read_bytes():
            return damage(root, kind, rng)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        (path.parent / "stray.bin").write_bytes(rng.bytes(10))
    return path.relative_to(root).as_posix()


def damages(root: Path, copy: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    kinds = ("flip", "truncate", "append", "delete", "swap", "stray")
    for number in range(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        kind = kinds[number % len(kinds)]
        name = damage(copy, kind, np.random.default_rng(number))
        assert problems(copy), f"{kind} of {name} (damage {number}) is not found"
        found[kind] += 1
    return found


def test_random_damage_is_found(tmp_path: Path) -> None:
    damages(write_cache(tmp_path / "cache", num_shards=2, per_shard=4), tmp_path / "copy", 60)


@pytest.mark.slow
def test_a_thousand_random_damages_are_found(tmp_path: Path) -> None:
    print(damages(write_cache(tmp_path / "cache", num_shards=3, per_shard=4), tmp_path / "copy", 1000))


def test_a_problem_says_where_what_and_how_to_mend_it_and_that_mends_it(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/c/1/0").write_bytes(b"nothing")
    (found,) = problems(root)
    assert found.where == "topk_ids/c/1/0"
    assert "it has 7 bytes" in found.what
    assert found.remedy.startswith("delete commits/000001.json and sealed.json, and run the same capture again")
    (root / "commits/000001.json").unlink()
    (root / "sealed.json").unlink()
    assert problems(write_cache(root)) == []


def with_rows(tmp_path: Path, **changes: object) -> list[str]:
    """Write a cache of one sequence whose targets are changed, and return what verify says of it."""
    import dataclasses

    chosen = settings()
    good = sequence(3, chosen)
    rows: TargetRows = dataclasses.replace(good.targets, **changes)  # type: ignore[arg-type]
    bad = SequenceRows(good.id, good.source, good.token_ids, good.target_mask, rows)
    with CacheWriter(tmp_path / "cache", manifest(chosen), 1) as writer:
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
