"""Verify finds damage, and training never reads it: a read gives the written values or an error."""

import dataclasses
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.damage import KINDS, Damage, append, delete, flip, overwrite, stray, truncate
from support.fake_cache import manifest, sequence, settings, write_cache
from torch import Tensor

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.format.layout import CODECS, ENCODINGS
from todi_offline.cache.format.records import ObjectSum
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheCorruptError, CacheIncompleteError, TodiError
from todi_offline.training.stream import CacheDataset, Collator


def batches(root: Path) -> list[dict[str, Tensor]]:
    """Read all of a cache as training does."""
    dataset, collate = CacheDataset(open_cache(root)), Collator()
    return [
        collate([dataset[index] for index in range(start, min(start + 3, len(dataset)))])
        for start in range(0, len(dataset), 3)
    ]


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)
        for mine, yours in zip(found, expected, strict=True)
    )


def in_training(root: Path, expected: list[dict[str, Tensor]]) -> str:
    """Return what damage does there; whatever is read must be what was written."""
    try:
        found = batches(root)
    except TodiError as error:
        message = str(error)
        assert str(root) in message
        assert "\n" not in message
        return "refused in training"
    assert same(found, expected)
    return "harmless to training"


@pytest.mark.parametrize("count", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_damage_is_found_and_reaches_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    combinations = [(codec, encoding) for codec in CODECS for encoding in ENCODINGS]
    for (codec, encoding), share in zip(combinations, np.array_split(np.arange(count), len(combinations)), strict=True):
        root, other = tmp_path / f"{codec} {encoding}", tmp_path / f"other {codec} {encoding}"
        kept = {"num_shards": 3, "codec": codec, "encoding": encoding}
        write_cache(root, per_shard=4, **kept)
        write_cache(other, per_shard=5, **kept)
        expected, copy = batches(root), tmp_path / "copy"
        for number in share.tolist():
            kind = KINDS[number % len(KINDS)]
            shutil.copytree(root, copy)
            what = f"{kind.__name__} of {kind(copy, np.random.default_rng(number), other)}, damage {number}"
            found = verify_cache(copy)
            assert found, what
            is_note = all(problem.is_note for problem in found)
            metadata = {problem.where for problem in found if problem.where.endswith("zarr.json")}
            assert kind is not stray or is_note, what
            assert kind is stray or metadata or not is_note, what  # metadata may say the same in other words
            table[kind.__name__]["noted by verify" if is_note else "found by verify"] += 1
            table[kind.__name__][in_training(copy, expected)] += 1
            shutil.rmtree(copy)
    print(f"\n{count} damages")
    for name, counted in table.items():
        print(f"  {name:10}", ", ".join(f"{counted[key]} {key}" for key in sorted(counted)))


def test_shards_of_the_same_layout_are_told_from_each_other(tmp_path: Path) -> None:
    """Chunks that no codec can shrink lie alike in every shard, and then the CRC-32C of the objects is the same."""
    chosen, vocab_size = settings(codec="fast"), 2**31
    with CacheWriter(tmp_path, manifest(chosen, 2, 2, vocab_size)) as writer:
        for shard in range(2):
            rows, rng = sequence(shard, chosen), np.random.default_rng(shard)
            tokens = rng.integers(0, vocab_size, 4096).astype(np.uint32)
            mask = np.arange(4096) < len(rows.targets)
            writer.write_shard(shard, [dataclasses.replace(rows, token_ids=tokens, target_mask=mask)])
        writer.seal()
    first, second = tmp_path / "token_ids/c/0", tmp_path / "token_ids/c/1"
    mine, yours = first.read_bytes(), second.read_bytes()
    assert mine != yours
    assert ObjectSum.of(mine) == ObjectSum.of(yours)
    first.write_bytes(yours)
    second.write_bytes(mine)
    with pytest.raises(CacheCorruptError, match=r"chunk 0 .*token_ids/c/0 is damaged: .* not the one"):
        open_cache(tmp_path)[0]
    assert [problem.where for problem in verify_cache(tmp_path)] == ["token_ids/c/0", "token_ids/c/1"]
    with pytest.raises(CacheCorruptError, match=r"token_ids/c/0 cannot be linked"):
        merge_caches([str(tmp_path)], str(tmp_path / "merged"))


@pytest.mark.parametrize("kind", [flip, truncate, overwrite, append, delete])
def test_a_damaged_shard_is_never_linked_by_a_merge(tmp_path: Path, kind: Damage) -> None:
    root = write_cache(tmp_path / "cache")
    kind(root / "topk_ids/c/1", np.random.default_rng(0), root)
    with pytest.raises(CacheCorruptError, match="topk_ids/c/1/0 cannot be linked"):
        merge_caches([str(root)], str(tmp_path / "merged"))
    with pytest.raises(CacheIncompleteError, match="not finished"):
        open_cache(tmp_path / "merged")
