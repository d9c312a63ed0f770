"""Malformed caches: only errors of this library, bounded memory, and no file outside the cache's folder."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from support.fuzzing import (
    ARRAYS,
    EDITS,
    NUM_SHARDS,
    PER_SHARD,
    Fuzzed,
    as_root,
    bounded_memory,
    edited,
    few_or_many,
    fuzz,
    fuzzed,
    with_crc,
)

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.names import ROOT_KEY, record_key, sequences_key
from todi_offline.cache.format.records import ObjectSum
from todi_offline.cache.format.sequences import SEQUENCE_SCHEMA
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> "Fuzzed":
    return fuzzed(tmp_path_factory)


@few_or_many
def test_bytes_that_change_anywhere(cache: Fuzzed, count: int) -> None:
    """With the sums of what was written, and with those of what is there."""

    def check(key: str, edits: list[tuple[str, float, bytes]], forged: bool) -> None:
        changed = {key: edited(cache.files[key], edits)}
        cache.survives(cache.with_right_sums(changed) if forged else changed)

    fuzz(check, 2 * count, st.sampled_from(sorted(cache.files)), EDITS, st.booleans())


NUMBERS = (0, -1, 1, 2, 3, 4096, 2**16, 2**31, 2**32, 2**62, 2**63, 10**30, 10**400, 0.5, 1e308)


SPECIAL = (float("nan"), float("inf"), True, None, [], {}, [[]], [{}], {"": 0}, [1.0], [1.0, 1.0], [0], [-1], [None])


TEXTS = ("", "a", "x" * 5000, "../x", "/etc/passwd", "c/../..", "\ud800", "\0", "a\nb", "f16", "q8", "compact")


SUMS = ([10**400], ["AAAA"], [1, 2, "AAAA"], [1, 2, "?"])


HOSTILE = st.sampled_from([*NUMBERS, *SPECIAL, *TEXTS, *SUMS])


CHANGES = st.lists(
    st.tuples(st.sampled_from(["value", "delete", "name", "nest"]), st.integers(0, 10**6), HOSTILE),
    min_size=1,
    max_size=3,
)


def changed_json(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """Change some of the nodes of a JSON document."""
    document: list[Any] = [json.loads(data)]
    for kind, number, value in changes:
        nodes = list(_nodes(document))
        holder, key = nodes[number % len(nodes)]
        if kind == "value":
            holder[key] = copy.deepcopy(value)  # a later change must not put a list into itself
        elif kind == "nest":
            holder[key] = [holder[key]]
        elif isinstance(holder, dict) and kind == "delete":
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(value)] = holder.pop(key)
    return json.dumps(document[0]).encode()


def _nodes(holder: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _nodes(holder[key])


@few_or_many
def test_a_manifest_that_says_anything(cache: Fuzzed, count: int) -> None:
    def check(changes: list[tuple[str, int, Any]]) -> None:
        cache.survives({ROOT_KEY: as_root(json.loads(changed_json(cache.files[ROOT_KEY], changes)))})

    fuzz(check, 2 * count, CHANGES)


@few_or_many
def test_records_that_say_anything(cache: Fuzzed, count: int) -> None:
    def check(key: str, changes: list[tuple[str, int, Any]]) -> None:
        cache.survives(cache.with_right_sums({key: changed_json(cache.files[key], changes)}))

    fuzz(check, 2 * count, st.sampled_from([record_key(0), record_key(1)]), CHANGES)


@pytest.mark.parametrize("key", ["cache.json", "zarr.json", "commits/000000.json", "topk_ids/zarr.json"])
def test_json_as_deep_as_a_file_is_long(cache: Fuzzed, key: str) -> None:
    for data in (
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"[" * 10**5 + b"]" * 10**5,
        b"1" * 10**5,
        b'"' + b"\\u0000" * 10**5 + b'"',
    ):
        cache.survives(cache.with_right_sums({key: data}))


COLUMNS = st.lists(
    st.tuples(
        st.sampled_from(SEQUENCE_SCHEMA.names),
        st.integers(0, PER_SHARD - 1),
        st.sampled_from(
            [0, 1, -1, 7, 4095, 4096, 4097, 8192, 2**31 - 1, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, -(2**63), None]
        ),
    ),
    min_size=1,
    max_size=4,
)


LAYOUTS = st.sampled_from(
    [
        {},
        {"compression": "zstd"},
        {"use_dictionary": False},
        {"row_group_size": 1},
        {"data_page_version": "2.0"},
        {"column_encoding": {"id": "DELTA_BYTE_ARRAY"}, "use_dictionary": False},
        {"version": "1.0"},
    ]
)


@few_or_many
def test_a_sequence_table_of_any_values(cache: Fuzzed, count: int) -> None:
    def check(changes: list[tuple[str, int, int | None]], layout: dict[str, Any], rows: list[int]) -> None:
        columns = pq.read_table(pa.BufferReader(cache.files[sequences_key(0)])).to_pydict()
        for name, row, value in changes:
            columns[name][row] = _as_cell(value, SEQUENCE_SCHEMA.field(name).type)
        table = pa.table(columns, SEQUENCE_SCHEMA).take(pa.array(rows, pa.int64()))
        cache.survives(cache.with_right_sums({sequences_key(0): parquet(table, **layout)}))

    every, some = st.just(list(range(PER_SHARD))), st.lists(st.integers(0, PER_SHARD - 1), max_size=5)
    fuzz(check, 2 * count, COLUMNS, LAYOUTS, every | some)


def _as_cell(value: int | None, kind: pa.DataType) -> Any:
    """Return a hostile number as the type of a column, where that has it."""
    if value is None:
        return None
    if pa.types.is_string(kind):
        return f"../{value}\n"
    if pa.types.is_fixed_size_binary(kind):
        return value.to_bytes(16, "little", signed=True)
    if pa.types.is_floating(kind):
        return float(value)
    size = 2**kind.bit_width
    value %= size
    return value - size if pa.types.is_signed_integer(kind) and value >= size // 2 else value


def parquet(table: pa.Table, **layout: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **({"compression": "none"} | layout))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def test_few_bytes_of_parquet_do_not_unfold_to_many(cache: Fuzzed) -> None:
    """One long text thousands of times, by a dictionary; one letter without end, by compression."""
    plain = pq.read_table(pa.BufferReader(cache.files[sequences_key(0)]))
    repeated = plain.take([0] * 4096).set_column(0, "id", pa.array(["x" * 100_000] * 4096))
    compressed = plain.set_column(0, "id", pa.array(["x" * 2**27, "b", "c"]))
    bombs = {
        "expands from": parquet(repeated),
        "uncompressed": parquet(compressed, compression="zstd", use_dictionary=False),
    }
    del repeated, compressed
    pa.default_memory_pool().release_unused()
    for message, data in bombs.items():
        assert len(data) < 600_000
        record = json.loads(cache.files[record_key(0)])
        record["num_sequences"] = pq.read_metadata(pa.BufferReader(data)).num_rows
        record["objects"][sequences_key(0)] = ObjectSum.of(data).to_json()
        changed = cache.with_right_sums({sequences_key(0): data, record_key(0): json.dumps(record).encode()})
        cache.survives(changed)
        with pytest.raises(CacheFormatError, match=message):
            cache.with_files(changed, cache.train)


def test_text_that_is_none_is_refused(cache: Fuzzed) -> None:
    data = cache.files[sequences_key(0)].replace(b"fake:1", b"fake\xff1")
    assert data != cache.files[sequences_key(0)]
    with pytest.raises(CacheCorruptError, match=r"000000.parquet cannot be read: .*UTF8"):
        cache.with_files(cache.with_right_sums({sequences_key(0): data}), cache.train)


def test_a_table_of_another_shard_is_refused(cache: Fuzzed) -> None:
    table = pq.read_table(pa.BufferReader(cache.files[sequences_key(0)]))
    other = table.set_column(table.column_names.index("shard"), "shard", pa.array([0, 1, 0], pa.uint32()))
    with pytest.raises(CacheFormatError, match=r"the sequence table of shard 0 of .* names other shards"):
        cache.with_files(cache.with_right_sums({sequences_key(0): parquet(other)}), cache.train)


PAIRS = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.integers(0, 1),
        st.integers(0, 3000) | st.sampled_from([2**31, 2**32 - 1, 2**33, 2**62, 2**63, 2**64 - 4, 2**64 - 1]),
    ),
    min_size=1,
    max_size=4,
)


@few_or_many
def test_a_chunk_index_that_says_anything(cache: Fuzzed, count: int) -> None:
    def check(name: str, pairs: list[tuple[int, int, int]]) -> None:
        spec = cache.manifest.arrays[name]
        data = cache.files[spec.object_key(0)]
        size = spec.chunks_per_shard * 16
        index = np.frombuffer(data[-size - 4 : -4], "<u8").reshape(-1, 2).copy()
        for chunk, column, value in pairs:
            index[chunk % len(index), column] = value
        cache.survives(cache.with_right_sums({spec.object_key(0): data[: -size - 4] + with_crc(index.tobytes())}))

    fuzz(check, count, st.sampled_from(ARRAYS), PAIRS)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 2**19},
        {"k": 2**31},
        {"shard_tokens": 2**26},
        {"shard_tokens": 2**40},
        {"tail_samples": 2**19},
        {"temperatures": list(range(1, 10**5))},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_sizes_that_a_manifest_only_claims_are_not_allocated(cache: Fuzzed, changes: dict[str, Any]) -> None:
    """A manifest of large arrays over the small ones, with records that name as many chunks."""
    claimed = json.loads(cache.files[ROOT_KEY])
    claimed["manifest"]["settings"] |= changes
    claimed["manifest"]["vocab_size"] = 2**32
    cache.survives({ROOT_KEY: as_root(claimed)})
    tokens = changes.get("shard_tokens", 0)
    if not tokens or tokens > 2**26:
        return
    records = {}
    for shard in range(NUM_SHARDS):
        values = json.loads(cache.files[record_key(shard)])
        for key, found in values["objects"].items():
            if len(found) == 3:  # it has sums of chunks
                rows = 4096 if key.startswith("t") and key.partition("/")[0] in ("token_ids", "target_mask") else 512
                values["objects"][key] = ObjectSum(found[0], found[1], bytes(4 * tokens // rows)).to_json()
        records[record_key(shard)] = json.dumps(values).encode()
    claimed["commits"] = [ObjectSum.of(record).to_json() for record in records.values()]
    cache.survives({ROOT_KEY: as_root(claimed), **records})


def test_a_record_that_leads_outside_the_folder_is_refused(cache: Fuzzed) -> None:
    outside = cache.root.parent / "outside.json"
    outside.write_bytes(b"secret")
    for key in ("../outside.json", str(outside), "commits/../../outside.json"):
        values = json.loads(cache.files[record_key(0)])
        values["objects"][key] = ObjectSum.of(b"secret").to_json()
        with pytest.raises(CacheFormatError, match="is not the key of an object of a cache"):
            cache.with_files(cache.with_right_sums({record_key(0): json.dumps(values).encode()}), cache.train)


def test_objects_may_be_symbolic_links_but_no_pipes_or_devices(cache: Fuzzed, tmp_path: Path) -> None:
    """A link is how hubs keep what they download; what it leads to is compared with the sums like any object."""
    moved, keys = tmp_path / "moved", (ROOT_KEY, sequences_key(0), "topk_ids/c/0/0")
    for key in keys:
        path = cache.root / key
        try:
            moved.write_bytes(cache.files[key])
            path.unlink()
            path.symlink_to(moved)
            assert verify_cache(cache.root) == []
            cache.train()
            moved.write_bytes(b"other")
            assert verify_cache_or_error(cache.root)
            for replace in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
                path.unlink()
                replace(path)
                assert verify_cache_or_error(cache.root)
                with pytest.raises(CacheError), bounded_memory():
                    cache.train()
        finally:
            path.unlink()
            path.write_bytes(cache.files[key])


def verify_cache_or_error(root: Path) -> list[Any]:
    try:
        return list(verify_cache(root))
    except CacheError as error:
        return [error]


def test_a_record_of_another_shard_is_refused(cache: Fuzzed) -> None:
    values = json.loads(cache.files[record_key(1)])
    with pytest.raises(CacheFormatError, match=r"000000.json is not the commit record of shard 0"):
        cache.with_files(cache.with_right_sums({record_key(0): json.dumps(values).encode()}), cache.train)
