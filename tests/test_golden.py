"""Golden caches of earlier formats are read the same by this release, and by independent readers."""

import dataclasses
import json
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from support.damage import Files
from support.disk import Watch
from support.fake_cache import sequence
from support.make_golden import CACHES, DATA, NUM_SHARDS, PER_SHARD, values_of, write_golden
from support.tools import run

from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheIncompleteError

Array = npt.NDArray[Any]
Values = dict[str, Array]

VERSIONS = sorted(path.stem for path in DATA.glob("format-*.zip"))


@pytest.fixture(scope="module", params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """The folder of the caches of a version, and what they hold."""
    folder = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(DATA / f"{request.param}.zip") as archive:
        archive.extractall(folder)
    with np.load(DATA / f"{request.param}.npz") as values:
        return folder, dict(values)


def files_of(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expected_of(golden: tuple[Path, Values], name: str, number: int) -> Values:
    prefix = f"{name}/{number}/"
    found = {key.removeprefix(prefix): value for key, value in golden[1].items() if key.startswith(prefix)}
    assert found
    return found


def assert_same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_there_is_a_golden_cache_of_every_encoding_and_codec(golden: tuple[Path, Values]) -> None:
    assert {path.name for path in golden[0].iterdir()} == set(CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_a_golden_cache_is_whole_and_reads_as_it_always_did(golden: tuple[Path, Values], name: str) -> None:
    root = golden[0] / name
    assert verify_cache(root) == []
    for number, found in enumerate(open_cache(root)):
        assert_same(values_of(found), expected_of(golden, name, number))
    assert number == NUM_SHARDS * PER_SHARD - 1


# A cache of an earlier format in the hands of this release


@pytest.fixture
def old_cache(tmp_path: Path) -> Callable[..., Path]:
    """Unpacks golden caches of format 1."""

    def unpacked(name: str, place: str = "old") -> Path:
        with zipfile.ZipFile(DATA / "format-1.zip") as archive:
            for member in archive.namelist():
                if member.startswith(f"{name}/"):
                    archive.extract(member, tmp_path / place)
        return tmp_path / place / name

    return unpacked


def append(root: Path, numbers: list[int], vocab_size: int = 300) -> None:
    """Add a shard of these sequences."""
    found = open_cache(root).manifest
    part = dataclasses.replace(found.parts[0], content="more", num_sequences=len(numbers), num_shards=1)
    with CacheWriter(root, dataclasses.replace(found, parts=(*found.parts, part))) as writer:
        (shard,) = writer.missing_shards()
        writer.write_shard(shard, [sequence(number, found.settings, vocab_size) for number in numbers])
        writer.seal()


@pytest.mark.parametrize("name", ["f16-compact", "root8-fast", "bf16_logit-balanced"])
def test_a_cache_of_format_1_is_appended_to_and_is_of_format_2_then(
    old_cache: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    root = old_cache(name)
    before = files_of(root)
    append(root, [7, 8])
    after = files_of(root)
    assert {key for key in before if before[key] != after.get(key)} == {
        "sealed.json",
        "zarr.json",
        *(f"{array}/zarr.json" for array in open_cache(root).manifest.arrays),
    }
    assert "cache.json" in after
    assert not {"sealed.json", "append.json"} & after.keys()
    assert verify_cache(root) == []
    cache = open_cache(root)
    assert cache.manifest.format_version == 2
    assert cache.sequences["id"].to_pylist() == [f"fake:{number}" for number in (0, 1, 2, 3, 7, 8)]
    fresh = write_golden(tmp_path / "fresh", **CACHES[name])
    append(fresh, [7, 8])
    for found, expected in zip(cache, open_cache(fresh), strict=True):
        assert_same(values_of(found), values_of(expected))


def test_the_capture_of_a_cache_of_format_1_confirms_it_and_makes_it_format_2(old_cache: Callable[..., Path]) -> None:
    root = old_cache("f16-fast")
    with CacheWriter(root, open_cache(root).manifest) as writer:
        assert (writer.missing_shards(), writer.is_sealed) == ([], True)
        writer.seal()
    assert (root / "cache.json").exists()
    assert not (root / "sealed.json").exists()
    assert verify_cache(root) == []


def test_a_capture_that_an_earlier_release_began_resumes(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    root, whole = old_cache("q8-balanced"), open_cache(old_cache("q8-balanced", "whole"))
    (root / "sealed.json").unlink()
    (root / "commits/000001.json").unlink()
    with pytest.raises(CacheIncompleteError, match="not finished"):
        open_cache(root)
    with CacheWriter(root, whole.manifest) as writer:
        assert writer.missing_shards() == [1]
        writer.write_shard(1, [sequence(number, whole.manifest.settings) for number in (2, 3)])
        writer.seal()
    assert verify_cache(root) == []
    for found, expected in zip(open_cache(root), whole, strict=True):
        assert_same(values_of(found), values_of(expected))


def test_an_append_to_a_cache_of_format_1_is_one_step(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    """At every operation of the disk a reader finds the old cache or the new one."""
    root, found = old_cache("f16-fast"), list[int]()
    with Watch(root, lambda _: found.append(len(open_cache(root)))):
        append(root, [7, 8])
    assert set(found) == {4, 6}
    assert found == sorted(found)


def test_an_append_of_format_1_that_claims_2_31_shards_costs_no_memory(old_cache: Callable[..., Path]) -> None:
    root = old_cache("f16-fast")
    group = json.loads((root / "zarr.json").read_text())["attributes"]["todi_offline"]
    group["parts"].append(group["parts"][0] | {"content": "d", "num_shards": 2**31 - 1})
    (root / "append.json").write_text(json.dumps({"attributes": {"todi_offline": group}}))
    verify_cache(root)  # imports zarr
    tracemalloc.start()
    found = verify_cache(root)
    assert len(open_cache(root, allow_unsealed=True)) == len(open_cache(root)) == 4
    assert repair_cache(root, dry_run=True).remaining == ()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.is_note for problem in found] == [True]  # a capture that has not finished
    assert peak < 2**24


def test_a_cache_of_format_1_is_subset_merged_and_narrowed(old_cache: Callable[..., Path], tmp_path: Path) -> None:
    root = old_cache("f16-compact")
    cache = open_cache(root)
    small = cache.manifest.settings
    run("subset", root, "--out", tmp_path / "subset", "--k", 3, "--tail-samples", 2)
    append(tmp_path / "subset", [7])
    other = write_golden(tmp_path / "other", encoding="f16", codec="compact", vocab_size=300)
    run("merge", root, other, "--out", tmp_path / "merged")
    for number, expected in enumerate(cache):
        assert_same(values_of(open_cache(tmp_path / "merged")[number]), values_of(expected))
        narrowed = narrow(expected.targets, dataclasses.replace(small, k=3, tail_samples=2), cache.content_keys[number])
        found = open_cache(tmp_path / "subset")[number].targets
        np.testing.assert_array_equal(found.tail_ids, narrowed.tail_ids)
        np.testing.assert_array_equal(found.logprobs, narrowed.logprobs)
    for place in ("subset", "merged"):
        assert verify_cache(tmp_path / place) == []
    assert "sealed.json" in files_of(root)  # nothing was written to it


# Other readers


@pytest.mark.parametrize("name", CACHES)
def test_zarr_and_the_description_give_the_same_numbers(golden: tuple[Path, Values], name: str) -> None:
    assert_described(golden, name, with_zarr)


@pytest.mark.parametrize("name", [name for name in CACHES if "compact" not in name])
def test_tensorstore_and_the_description_give_the_same_numbers(golden: tuple[Path, Values], name: str) -> None:
    """It has no pcodec, which Zarr's registry of codecs does not list."""
    assert_described(golden, name, with_tensorstore)


def with_zarr(root: Path, name: str) -> Array:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        found: Array = zarr.open_group(str(root), mode="r", use_consolidated=False)[name][...]  # type: ignore[index]
    return found


def with_tensorstore(root: Path, name: str) -> Array:
    import tensorstore

    place = {"driver": "file", "path": str(root / name)}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    return np.asarray(opened.read().result())


def assert_described(golden: tuple[Path, Values], name: str, read: Callable[[Path, str], Array]) -> None:
    """Compare what a reader makes of a cache, that knows Zarr, Parquet and the README alone, with what it holds."""
    root = golden[0] / name
    described = json.loads((root / "zarr.json").read_text())["attributes"]["todi_offline"]
    settings = described.get("manifest", described)["settings"]
    arrays = {path.parent.name: read(root, path.parent.name) for path in root.glob("*/zarr.json")}
    tables = [pq.read_table(path).to_pylist() for path in sorted((root / "sequences").iterdir())]
    for number, row in enumerate(row for table in tables for row in table):
        tokens = slice(row["token_start"], row["token_start"] + row["num_tokens"])
        targets = slice(row["target_start"], row["target_start"] + row["num_targets"])
        parts = {
            key: values[tokens if key in ("token_ids", "target_mask") else targets] for key, values in arrays.items()
        }
        if settings["encoding"] in ("root8", "bf16_logit"):
            parts["topk_ids"] = ids_of_gaps(arrays["topk_ids"], targets)
        found = DECODERS[settings["encoding"]](parts)
        found |= {"token_ids": parts["token_ids"], "target_mask": parts["target_mask"].astype(bool)}
        expected = expected_of(golden, name, number)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


def ids_of_gaps(gaps: Array, targets: slice) -> Array:
    """Return the ids that rows of targets keep, from the gaps between the sorted keys id * 512 + row of each chunk."""
    rows: list[list[int]] = [[] for _ in range(len(gaps))]
    for chunk in range(0, len(gaps), 512):
        key = 0
        if not gaps[chunk : chunk + 512].any():  # an absent one: there are no such rows
            rows[chunk : chunk + 512] = gaps[chunk : chunk + 512].tolist()
            continue
        for gap in gaps[chunk : chunk + 512].ravel().tolist():
            key += gap
            rows[chunk + key % 512].append(key // 512)
    return np.array(rows[targets])


def as_they_are(parts: Values) -> Values:
    """Return the fields that f16, q8 and bf16_logit store as the numbers themselves."""
    plain = ("tail_logsumexp", "label_logprob", "tail_ids", "tail_logprobs")
    return {key: parts[key].astype(np.int64 if key == "tail_ids" else np.float32) for key in plain}


def f16(parts: Values) -> Values:
    return {"ids": parts["topk_ids"], "logprobs": parts["topk_logprobs"].astype(np.float32), **as_they_are(parts)}


def q8(parts: Values) -> Values:
    steps = parts["topk_logprobs"].astype(np.int64).cumsum(axis=1)
    return {"ids": parts["topk_ids"], "logprobs": -steps / 16, **as_they_are(parts)}


def bf16_logit(parts: Values) -> Values:
    logits = (parts["topk_logprobs"].astype(np.uint32) << 16).view(np.float32)
    logprobs = logits - parts["log_partition"][:, None]
    return {**ranked(parts["topk_ids"], logprobs), "log_partition": parts["log_partition"], **as_they_are(parts)}


def root8(parts: Values) -> Values:
    stored = parts["topk_logprobs"].astype(np.float64)
    logprobs = 4 * np.log(np.where(stored == 0, 0.25, stored) / 128)
    steps = {"tail_logsumexp": (32, -(2**15)), "label_logprob": (16, -(2**15)), "tail_logprobs": (4, -(2**7))}
    nats = {
        key: np.where(parts[key] == least, -np.inf, parts[key] / per_nat) for key, (per_nat, least) in steps.items()
    }
    return {**ranked(parts["topk_ids"], logprobs), "tail_ids": parts["tail_ids"], **nats}


def ranked(ids: Array, logprobs: Array) -> Values:
    """Sort rows by falling log-prob and, among equals, rising id."""
    order = np.lexsort((ids, -logprobs), axis=1)
    return {"ids": np.take_along_axis(ids, order, 1), "logprobs": np.take_along_axis(logprobs, order, 1)}


DECODERS: dict[str, Callable[[Values], Values]] = {"f16": f16, "q8": q8, "bf16_logit": bf16_logit, "root8": root8}
