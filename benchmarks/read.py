"""How fast are targets read, at random and in order, beside zarr-python, Parquet and a memory-mapped file?

All that training needs of 512 targets is read and decoded: ids, log-probs, tail sums, the label's log-prob and the
tail samples. "random" begins anywhere in the cache, "in order" goes through it, "sequences" reads whole sequences as
training does, tokens and mask included. The layouts:

    ours            the direct reader
    zarr-python     the same files through zarr.open_group, with its defaults
    parquet         one file of fixed-size lists, zstd, row groups of 512 rows
    memmap          arrays that are not compressed, one file each

The encoding is f16, whose log-probs every reader can use directly. One process and one thread of ours, the page
cache warm. Ratios are medians over repetitions, all layouts in turns.

Not claimed: anything about cold disks, object stores or several readers.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from benchmarks._tiled import tiled_cache
from todi_offline.cache.format.encoding import decode_rows
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.shard_file import ShardFile

Read = Callable[[int, int], object]
"""Reads targets start to stop, counted over the cache."""

ROWS = 512
BAR = 5.0
"""Random reads: our rate over zarr-python's, at least."""


def run(quick: bool, cache: str | None = None, codec: str = "compact") -> dict[str, object]:
    repetitions, reads = (2, 10) if quick else (7, 60)
    with tempfile.TemporaryDirectory() as folder:
        source = tiled_cache(Path(folder) / "cache", 20_000 if quick else 400_000, cache, encoding="f16", codec=codec)
        opened = open_cache(Path(folder) / "cache")
        readers = {
            "ours": lambda start, stop: _ours(opened, start, stop),
            "zarr-python": _zarr_python(opened),
            "parquet": _parquet(opened, Path(folder)),
            "memmap": _memmap(opened, Path(folder)),
        }
        _require_same(readers)
        rates = _rates(opened, readers, repetitions, reads)
    print(f"{source}; codec {codec}; {len(opened):,} sequences, {opened.num_targets.sum():,} targets\n")
    _print(rates)
    ratio = _ratio(rates["random"], "ours", "zarr-python")
    print(f"\nrandom: {ratio:.1f} x zarr-python, at least {BAR:g}: {'met' if ratio >= BAR else 'MISSED'}")
    return {
        "source": source,
        "codec": codec,
        "targets": int(opened.num_targets.sum()),
        "targets_per_second": {
            kind: {name: round(statistics.median(values)) for name, values in by_name.items()}
            for kind, by_name in rates.items()
        },
        "random over zarr-python": round(ratio, 2),
    }


def _rates(cache: Cache, readers: dict[str, Read], repetitions: int, reads: int) -> dict[str, dict[str, list[float]]]:
    """Return targets a second by kind of reading and layout; a first round is not counted."""
    rng = np.random.default_rng(0)
    per_shard = _targets_per_shard(cache)
    rates: dict[str, dict[str, list[float]]] = {"random": {}, "in order": {}, "sequences": {}}
    for repetition in range(repetitions + 1):
        shards = rng.integers(0, len(per_shard), reads)
        starts = rng.integers(0, per_shard[shards] - ROWS) + shards * cache.manifest.settings.shard_tokens
        ordered = np.arange(reads) * ROWS
        chosen = rng.integers(0, len(cache), reads)
        for name, read in readers.items():
            for kind, places in (("random", starts), ("in order", ordered[: per_shard[0] // ROWS])):
                seconds = _seconds([partial(read, int(start), int(start) + ROWS) for start in places])
                if repetition:
                    rates[kind].setdefault(name, []).append(len(places) * ROWS / seconds)
        seconds = _seconds([partial(cache.__getitem__, int(index)) for index in chosen])
        if repetition:
            rates["sequences"].setdefault("ours", []).append(int(cache.num_targets[chosen].sum()) / seconds)
    return rates


def _seconds(work: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for piece in work:
        piece()
    return time.perf_counter() - started


def _targets_per_shard(cache: Cache) -> npt.NDArray[np.int64]:
    shard_rows = cache.manifest.settings.shard_tokens
    places = cache.sequences["target_start"].to_numpy() // shard_rows
    return np.bincount(places, weights=cache.num_targets).astype(np.int64)


def _decoded(cache: Cache, arrays: dict[str, Any]) -> Any:
    settings = cache.manifest.settings
    return decode_rows(arrays, settings.encoding, settings.temperatures, settings.tail_temperature)


def _target_specs(cache: Cache) -> dict[str, Any]:
    return {name: spec for name, spec in cache.manifest.arrays.items() if spec.axis == "target"}


def _ours(cache: Cache, start: int, stop: int) -> Any:
    shard, first = divmod(start, cache.manifest.settings.shard_tokens)
    codec = cache.manifest.settings.codec
    arrays = {
        name: ShardFile(cache.store.local(spec.object_key(shard)), spec, codec).read_rows(first, first + stop - start)
        for name, spec in _target_specs(cache).items()
    }
    return _decoded(cache, arrays)


def _zarr_python(cache: Cache) -> Read:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        group = zarr.open_group(cache.root, mode="r")
        arrays: dict[str, Any] = {name: group[name] for name in _target_specs(cache)}
    return lambda start, stop: _decoded(cache, {name: array[start:stop] for name, array in arrays.items()})


def _all_rows(cache: Cache) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """Return the stored rows of all shards end to end, and how many of them lie before each shard."""
    per_shard, codec = _targets_per_shard(cache), cache.manifest.settings.codec
    rows = {
        name: np.concatenate(
            [
                ShardFile(cache.store.local(spec.object_key(shard)), spec, codec).read_rows(0, int(count))
                for shard, count in enumerate(per_shard)
            ]
        )
        for name, spec in _target_specs(cache).items()
    }
    return rows, np.cumsum(per_shard) - per_shard


def _parquet(cache: Cache, folder: Path) -> Read:
    rows, before = _all_rows(cache)
    columns = {
        name: pa.array(values)
        if values.ndim == 1
        else pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])
        for name, values in rows.items()
    }
    pq.write_table(pa.table(columns), folder / "targets.parquet", row_group_size=ROWS, compression="zstd")
    file = pq.ParquetFile(folder / "targets.parquet")
    shapes = {name: values.shape[1:] for name, values in rows.items()}

    def read(start: int, stop: int) -> Any:
        shard, first = divmod(start, cache.manifest.settings.shard_tokens)
        first += int(before[shard])
        groups = range(first // ROWS, (first + stop - start - 1) // ROWS + 1)
        table = file.read_row_groups(list(groups)).slice(first - groups[0] * ROWS, stop - start)
        arrays = {}
        for name, shape in shapes.items():
            column = table[name].combine_chunks()
            values = column.flatten() if shape else column
            arrays[name] = values.to_numpy(zero_copy_only=False).reshape(-1, *shape)
        return _decoded(cache, arrays)

    return read


def _memmap(cache: Cache, folder: Path) -> Read:
    rows, before = _all_rows(cache)
    for name, values in rows.items():
        np.save(folder / f"{name}.npy", values)
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in rows}

    def read(start: int, stop: int) -> Any:
        shard, first = divmod(start, cache.manifest.settings.shard_tokens)
        first += int(before[shard])
        return _decoded(cache, {name: np.array(values[first : first + stop - start]) for name, values in maps.items()})

    return read


def _require_same(readers: dict[str, Read]) -> None:
    """All layouts must hold the same numbers."""
    expected: Any = readers["ours"](700, 1212)
    for read in readers.values():
        found: Any = read(700, 1212)
        for name, values in expected.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], values)


def _ratio(values: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(values[name], values[other], strict=True))


def _print(rates: dict[str, dict[str, list[float]]]) -> None:
    print(f"{'targets a second':18}{'random':>14}{'':8}{'in order':>14}{'':8}{'sequences':>14}")
    for name in rates["random"]:
        cells = ""
        for kind in ("random", "in order"):
            median = statistics.median(rates[kind][name])
            cells += f"{median:14,.0f}{_ratio(rates[kind], name, 'ours'):7.2f}x"
        sequences = f"{statistics.median(rates['sequences'][name]):14,.0f}" if name in rates["sequences"] else ""
        print(f"{name:18}{cells}{sequences}")
