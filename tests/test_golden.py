"""What was once written is read the same for ever: by this release, and by others that only know the description."""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from support.make_golden import CACHES, DATA, NUM_SHARDS, PER_SHARD, values_of

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache
from todi_offline.errors import CacheFormatError

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


def test_a_golden_cache_of_a_newer_version_is_refused_with_both_versions(golden: tuple[Path, Values]) -> None:
    path = golden[0] / "q8-fast" / "zarr.json"
    text = path.read_text()
    version = json.loads(text)["attributes"]["todi_offline"]["format_version"]
    path.write_text(text.replace(f'"format_version": {version}', f'"format_version": {version + 1}'))
    try:
        with pytest.raises(CacheFormatError, match=f"of format version {version + 1}, this release reads version 1; "):
            open_cache(path.parent)
    finally:
        path.write_text(text)


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
    settings = json.loads((root / "zarr.json").read_text())["attributes"]["todi_offline"]["settings"]
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
