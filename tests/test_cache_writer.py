"""Writing a cache: refusals, interruptions, and the bytes of the result."""

import dataclasses
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_cache import manifest, sequence, settings, write_cache

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.names import record_key, temporary_key
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import (
    CacheError,
    CacheFormatError,
    CacheIncompleteError,
    CacheLockedError,
    CacheMismatchError,
    ConfigError,
    DataError,
)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_writing_twice_gives_the_same_bytes_and_no_other_files(tmp_path: Path) -> None:
    first, second = write_cache(tmp_path / "a"), write_cache(tmp_path / "b")
    assert contents(first) == contents(second)
    assert not [name for name in contents(first) if name.endswith(".tmp") or "lock" in name]


def test_a_cache_holds_no_path_and_no_host_name(tmp_path: Path) -> None:
    host = os.uname().nodename.encode()
    for name, data in contents(write_cache(tmp_path / "somewhere")).items():
        assert b"somewhere" not in data, name
        assert len(host) < 4 or host not in data, name


def test_writing_resumes_after_the_last_committed_shard(tmp_path: Path) -> None:
    whole = contents(write_cache(tmp_path / "whole", num_shards=3))
    chosen = settings()
    with CacheWriter(tmp_path / "part", manifest(chosen, 3, 36)) as writer:
        writer.write_shard(0, [sequence(number, chosen) for number in range(12)])
    with CacheWriter(tmp_path / "part", manifest(chosen, 3, 36)) as writer:
        assert writer.missing_shards() == [1, 2]
        assert not writer.is_sealed
    write_cache(tmp_path / "part", num_shards=3)
    assert contents(tmp_path / "part") == whole


def test_a_cache_begun_with_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=re.escape("settings.k: 6 in the cache, 7 now")):
        write_cache(tmp_path / "cache", k=7)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        write_cache(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_of_folders_is_refused_unless_an_interrupted_creation_left_it(tmp_path: Path) -> None:
    (tmp_path / "photos" / "photos").mkdir(parents=True)
    (tmp_path / "photos" / "photos" / "1.jpg").touch()
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        write_cache(tmp_path / "photos")
    (tmp_path / "cache" / "token_ids").mkdir(parents=True)
    (tmp_path / "cache" / "token_ids" / temporary_key("zarr.json", "0123456789abcdef")).write_text("{")
    (tmp_path / "cache" / temporary_key("cache.json", "0123456789abcdef")).write_text("{")
    (tmp_path / "cache" / ".lock").write_text("")
    assert len(open_cache(write_cache(tmp_path / "cache"))) == 24
    assert not [name for name in contents(tmp_path / "cache") if name.endswith((".tmp", ".lock"))]


@pytest.mark.parametrize("found", ["{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_a_zarr_group_that_is_no_cache_is_left_alone(tmp_path: Path, found: str) -> None:
    (tmp_path / "zarr.json").write_text(found)
    with pytest.raises(CacheFormatError, match="not a cache"):
        write_cache(tmp_path)
    assert contents(tmp_path) == {"zarr.json": found.encode()}


def test_lost_metadata_are_rewritten_when_a_capture_resumes(tmp_path: Path) -> None:
    whole = contents(write_cache(tmp_path / "whole"))
    root = write_cache(tmp_path / "cache")
    (root / "topk_ids/zarr.json").unlink()
    (root / "zarr.json").write_text("{}")
    assert contents(write_cache(root)) == whole


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot create .*choose another folder"):
        write_cache(tmp_path / "file" / "cache")


def test_a_cache_with_missing_shards_cannot_be_sealed(tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path / "cache", manifest(settings(), 2, 24)) as writer,
        pytest.raises(CacheIncompleteError, match=re.escape("shards [0, 1] are not committed")),
    ):
        writer.seal()


def test_a_shard_whose_object_is_gone_cannot_be_sealed(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", seal=False)
    (root / "topk_ids/c/1/0").unlink()
    with (
        CacheWriter(root, manifest(settings(), 2, 24)) as writer,
        pytest.raises(CacheIncompleteError, match=r"topk_ids/c/1/0 has no bytes, expected \d+"),
    ):
        writer.seal()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": -1}, "expected both from 0"),
        ({"tail_samples": -1}, "expected both from 0"),
        ({"k": 0, "tail_samples": 0}, "nothing would be kept"),
        ({"temperatures": ()}, "expected at least one"),
        ({"temperatures": (1.0, -2.0)}, "each above 0"),
        ({"temperatures": (1.0, 1.0)}, "expected each once"),
        ({"tail_temperature": 3.0}, "not one of the temperatures"),
        ({"shard_tokens": 1000}, "expected a multiple of 4096"),
        ({"encoding": "f8"}, "expected one of f16, q8"),
    ],
)
def test_settings_that_no_capture_could_honour_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("k", "samples", "shard_tokens"), [(32, 8, 131_072), (1024, 0, 126_976), (150_000, 0, 4096), (300_000, 8, 4096)]
)
def test_shards_have_as_many_tokens_as_take_a_gibibyte(k: int, samples: int, shard_tokens: int) -> None:
    chosen = CacheSettings(k=k, tail_samples=samples)
    assert chosen.shard_tokens == shard_tokens
    assert shard_tokens in (131_072, 4096) or chosen.shard_tokens * chosen.target_bytes <= 2**30


def test_a_shard_too_large_for_memory_is_refused_with_a_size_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"293 GiB of memory .*lower shard_tokens to 24,576"):
        CacheSettings(k=150_000, tail_samples=0, shard_tokens=262_144)


# Rows


def rows_of(number: int, **changes: Any) -> SequenceRows:
    return dataclasses.replace(sequence(number, settings()), **changes)


ROWS: list[tuple[Callable[[SequenceRows], dict[str, Any]], str]] = [
    (lambda rows: {"targets": rows.targets[1:]}, "supervises"),
    (lambda rows: {"target_mask": np.zeros_like(rows.target_mask)}, "supervises no position"),
    (lambda rows: {"target_mask": np.ones_like(rows.target_mask)}, "its last position"),
    (lambda rows: {"target_mask": rows.target_mask[1:]}, "as many booleans"),
    (lambda rows: {"target_mask": rows.target_mask.astype(np.uint8)}, "as many booleans"),
    (lambda rows: {"token_ids": rows.token_ids.astype(np.int64)}, "as many booleans"),
    (lambda rows: {"token_ids": rows.token_ids[:, None]}, "as many booleans"),
]


@pytest.mark.parametrize(("change", "message"), ROWS)
def test_a_sequence_whose_parts_do_not_fit_together_cannot_be_built(
    change: Callable[[SequenceRows], dict[str, Any]], message: str
) -> None:
    rows = rows_of(3)
    with pytest.raises(DataError, match=f"'fake:3' .*{message}"):
        dataclasses.replace(rows, **change(rows))


def with_ids_from(first: int) -> TargetRows:
    targets = rows_of(1).targets
    return dataclasses.replace(targets, ids=targets.ids + np.uint32(first))


SEQUENCES: list[tuple[Callable[[], list[SequenceRows]], str]] = [
    (list, "no sequence"),
    (lambda: [sequence(1, settings(k=5))], "k, temperatures and samples"),
    (lambda: [sequence(1, settings(tail_samples=0))], "k, temperatures and samples"),
    (lambda: [sequence(1, settings(temperatures=(1.0,)))], "k, temperatures and samples"),
    (lambda: [rows_of(1, token_ids=rows_of(1).token_ids + np.uint32(300))], "beyond the vocabulary of 300"),
    (
        lambda: [rows_of(1, targets=with_ids_from(300))],
        "beyond the vocabulary of 300",
    ),
    (lambda: [sequence(1, settings())] * 600, "more than the 4,096"),
]


@pytest.mark.parametrize(("make", "message"), SEQUENCES, ids=[message for _, message in SEQUENCES])
def test_rows_that_the_reader_would_refuse_are_not_written(
    tmp_path: Path, make: Callable[[], list[SequenceRows]], message: str
) -> None:
    with CacheWriter(tmp_path / "cache", manifest(settings(), 2, 24)) as writer:
        with pytest.raises(DataError, match=message):
            writer.write_shard(0, make())
        assert sorted(contents(tmp_path / "cache")) == [".lock", "cache.json"]


# A writer in two halves


def test_other_processes_write_the_shards_of_one_that_holds_the_lock(tmp_path: Path) -> None:
    whole, chosen = contents(write_cache(tmp_path / "whole", num_shards=3, per_shard=2)), settings()
    with CacheWriter(tmp_path / "cache", manifest(chosen, 3, 6)) as writer:
        with ProcessPoolExecutor(2, get_context("fork")) as pool:
            jobs = [
                pool.submit(writer.shards.write, shard, [sequence(2 * shard, chosen), sequence(2 * shard + 1, chosen)])
                for shard in writer.missing_shards()
            ]
            records = [job.result() for job in jobs]
        assert [record.shard for record in records] == [0, 1, 2]
        writer.seal()
    assert contents(tmp_path / "cache") == whole


def test_a_shard_that_is_written_twice_with_the_same_bytes_is_written_once(tmp_path: Path) -> None:
    chosen = settings()
    with CacheWriter(tmp_path / "cache", manifest(chosen)) as writer:
        first = writer.write_shard(0, [sequence(1, chosen)])
        assert writer.write_shard(0, [sequence(1, chosen)]) == first


def test_an_object_that_a_record_names_is_never_replaced(tmp_path: Path) -> None:
    chosen = settings()
    with CacheWriter(tmp_path / "cache", manifest(chosen)) as writer:
        writer.write_shard(0, [sequence(1, chosen)])
        before = contents(tmp_path / "cache")
        with pytest.raises(CacheLockedError, match=r"shard 0 .* was written by"):
            writer.write_shard(0, [sequence(2, chosen)])
        assert contents(tmp_path / "cache") == before


def test_objects_of_an_attempt_without_a_record_are_replaced(tmp_path: Path) -> None:
    whole, chosen = contents(write_cache(tmp_path / "whole", num_shards=1)), settings()
    with CacheWriter(tmp_path / "cache", manifest(chosen, 1, 12)) as writer:
        writer.write_shard(0, [sequence(number, chosen) for number in range(20, 24)])
        (tmp_path / "cache" / record_key(0)).unlink()
    assert contents(write_cache(tmp_path / "cache", num_shards=1)) == whole


def test_without_the_lock_no_shard_is_written(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache", manifest(settings())) as writer:
        shards = writer.shards
    with pytest.raises(CacheLockedError, match="taken over"):
        shards.write(0, [sequence(1, settings())])
    assert sorted(contents(tmp_path / "cache")) == ["cache.json"]


def test_writing_resumes_with_other_library_versions_and_records_them(tmp_path: Path) -> None:
    chosen = settings()
    for version in ("1.0", "2.0", "1.0"):
        part = dataclasses.replace(manifest(chosen).parts[0], versions={"numpy": version, "torch": "0"})
        with CacheWriter(tmp_path / "cache", dataclasses.replace(manifest(chosen), parts=(part,))):
            pass
    with CacheWriter(tmp_path / "cache", dataclasses.replace(manifest(chosen), parts=(part,))) as writer:
        writer.write_shard(0, [sequence(1, chosen)])
        writer.seal()
    assert open_cache(tmp_path / "cache").manifest.parts[0].versions == {"numpy": "1.0, 2.0", "torch": "0"}


def test_an_interrupted_part_takes_no_other_data(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", num_shards=2, per_shard=1, seal=False)
    other = manifest(settings(), 2, 2)
    other = dataclasses.replace(other, parts=(dataclasses.replace(other.parts[0], content="other"),))
    with pytest.raises(CacheMismatchError, match="not finished"), CacheWriter(tmp_path / "cache", other):
        pass
