"""`todi-cache import`: columns of every Arrow type, range and shape; wrong values are named, never cast."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_cache import VOCAB, sequence, settings, write_cache
from support.foreign_rows import DESCRIBED, plain_rows, write_rows
from support.tools import run

from todi_offline.cache.convert.describing import fewest_entries, imported_manifest
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.format.layout import ENCODINGS
from todi_offline.cache.reader import open_cache
from todi_offline.errors import DataError

NAN, INF = float("nan"), float("inf")
TAILED = settings(tail_samples=2, temperatures=(1.0, 2.0))


def imported(table: Path, described: Any = DESCRIBED) -> Path:
    out = table.with_name("imported")
    import_table(table, str(out), described)
    return out


def refusal(table: Path, described: Any = DESCRIBED) -> str:
    """Return why a table is refused; nothing may have been written."""
    with pytest.raises(DataError) as caught:
        imported(table, described)
    assert not table.with_name("imported").exists()
    assert str(table) in str(caught.value)
    return str(caught.value)


def with_types(path: Path, rows: list[dict[str, Any]], types: dict[str, pa.DataType]) -> Path:
    """Write rows as a table of which some columns have these types."""
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        cells = [row[name] for row in rows]
        if name == "target_mask" and kind.value_type != pa.bool_():
            cells = [list(map(int, cell)) for cell in cells]
        column = pa.array(cells, kind)
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)
    return path


def tailed_rows() -> list[dict[str, Any]]:
    """Return two rows that have all that a cache keeps: tails at two temperatures, and samples."""
    rows = []
    for number in range(2):
        made = sequence(number, TAILED)
        rows.append(
            {
                "input_ids": made.token_ids.tolist(),
                "target_mask": made.target_mask.tolist(),
                "target_ids": made.targets.ids.tolist(),
                "target_logprobs": made.targets.logprobs.tolist(),
                **{name: values.tolist() for name, values in made.targets.arrays().items() if "id" not in name},
                "tail_ids": made.targets.arrays()["tail_ids"].tolist(),
            }
        )
        del rows[-1]["logprobs"]
    return rows


# Types


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("input_ids", pa.list_(pa.float64())),
        ("input_ids", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.list_(pa.int64()))),
        ("input_ids", pa.string()),
        ("target_mask", pa.list_(pa.float32())),
        ("target_mask", pa.list_(pa.list_(pa.bool_()))),
        ("target_ids", pa.list_(pa.list_(pa.float32()))),
        ("target_ids", pa.list_(pa.int64())),
        ("target_ids", pa.list_(pa.struct([("id", pa.int64())]))),
        ("target_logprobs", pa.list_(pa.list_(pa.decimal128(9, 4)))),
        ("target_logprobs", pa.list_(pa.float32())),
        ("target_logprobs", pa.float32()),
        ("label_logprob", pa.list_(pa.string())),
        ("label_logprob", pa.list_(pa.int64())),
        ("id", pa.int64()),
    ],
    ids=lambda value: str(value),
)
def test_a_column_of_another_type_is_refused_with_both_types(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(2)))
    empty = pa.nulls(2, kind)
    read = pq.read_table(table)
    columns = {name: read[name] for name in read.column_names} | {column: empty}
    pq.write_table(pa.table(columns), table)
    text = refusal(table)
    assert f"column {column}: its type is {pq.read_schema(table).field(column).type}, expected" in text


INTEGERS = [pa.int16(), pa.int32(), pa.int64(), pa.uint16(), pa.uint32(), pa.uint64()]
SAME = {
    **{f"ids of {kind}": {"input_ids": pa.list_(kind), "target_ids": pa.list_(pa.list_(kind))} for kind in INTEGERS},
    **{f"mask of {kind}": {"target_mask": pa.list_(kind)} for kind in (pa.int8(), pa.int64(), pa.uint8())},
    "doubles": {"target_logprobs": pa.list_(pa.list_(pa.float64())), "label_logprob": pa.list_(pa.float64())},
    "large lists": {
        "input_ids": pa.large_list(pa.int32()),
        "target_mask": pa.large_list(pa.bool_()),
        "target_ids": pa.large_list(pa.large_list(pa.int32())),
        "target_logprobs": pa.large_list(pa.large_list(pa.float32())),
        "label_logprob": pa.large_list(pa.float32()),
    },
    "lists of fixed size": {
        "target_ids": pa.list_(pa.list_(pa.int32(), 6)),
        "target_logprobs": pa.large_list(pa.list_(pa.float32(), 6)),
    },
}


@pytest.mark.parametrize("types", SAME.values(), ids=SAME)
def test_the_same_numbers_in_another_type_give_the_same_targets(tmp_path: Path, types: dict[str, pa.DataType]) -> None:
    rows = plain_rows(range(3))
    found = open_cache(imported(with_types(tmp_path / "rows.parquet", rows, types)))
    expected = tmp_path / "expected"
    import_table(write_rows(tmp_path / "plain.parquet", rows), str(expected), DESCRIBED)
    for mine, other in zip(found, open_cache(expected), strict=True):
        np.testing.assert_array_equal(mine.token_ids, other.token_ids)
        for name, values in other.targets.arrays().items():
            np.testing.assert_array_equal(mine.targets.arrays()[name], values)


def test_dictionaries_are_read_as_their_values(tmp_path: Path) -> None:
    table = write_rows(
        tmp_path / "rows.parquet", [{"id": f"row {n}", **row} for n, row in enumerate(plain_rows(range(3)))]
    )
    read = pq.read_table(table)
    tokens = read["input_ids"].combine_chunks()
    encoded = pa.ListArray.from_arrays(tokens.offsets, tokens.values.dictionary_encode())
    columns = {name: read[name] for name in read.column_names}
    columns |= {"id": read["id"].dictionary_encode(), "input_ids": encoded}
    pq.write_table(pa.table(columns), table)
    found = open_cache(imported(table))
    assert found.sequences["id"].to_pylist() == ["row 0", "row 1", "row 2"]
    np.testing.assert_array_equal(found[0].token_ids, sequence(0, settings()).token_ids)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(2)))
    read = pq.read_table(table)
    pq.write_table(read.append_column("input_ids", read["input_ids"]), table)
    assert "2 columns named input_ids" in refusal(table)


# Values


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("input_ids", lambda v: v.__setitem__(3, -1), "column input_ids: position 3 is -1"),
        ("input_ids", lambda v: v.__setitem__(3, VOCAB), f"column input_ids: position 3 is {VOCAB}"),
        ("input_ids", lambda v: v.__setitem__(3, 2**32 + 191), "position 3 is 4294967487"),
        ("input_ids", lambda v: v.__setitem__(3, None), "column input_ids: the value 3 is empty"),
        ("input_ids", lambda v: v.pop(), "expected the same number, at least one true"),
        ("input_ids", lambda v: v.clear(), "the row has 0 input_ids"),
        (
            "target_ids",
            lambda v: v[2].__setitem__(1, 2**32 + 191),
            "column target_ids: target 2, entry 1 is 4294967487",
        ),
        ("target_ids", lambda v: v[2].__setitem__(1, VOCAB), f"column target_ids: target 2, entry 1 is {VOCAB}"),
        ("target_ids", lambda v: v[2].__setitem__(0, -1), "column target_ids: target 2, entry 0 is -1"),
        ("target_ids", lambda v: v[2].__setitem__(0, v[2][1]), "target 2: ids repeat"),
        ("target_ids", lambda v: v[2].__setitem__(0, None), "column target_ids: the value 12 is empty"),
        ("target_ids", lambda v: v.__setitem__(2, None), "column target_ids: the list of target 2 is empty"),
        ("target_ids", lambda v: v[2].pop(), "target 2 has 5 ids and 6 log-probs; expected one log-prob"),
        ("target_ids", lambda v: v.pop(), r"column target_ids: the cell has \d+ targets"),
        ("target_logprobs", lambda v: v.pop(), r"column target_logprobs: the cell has \d+ targets"),
        ("target_logprobs", lambda v: v[2].__setitem__(0, 0.5), "column target_logprobs: target 2, entry 0 is 0.5"),
        ("target_logprobs", lambda v: v[2].__setitem__(0, NAN), "column target_logprobs: target 2, entry 0 is nan"),
        ("target_logprobs", lambda v: v[2].__setitem__(0, INF), "column target_logprobs: target 2, entry 0 is inf"),
        ("target_logprobs", lambda v: v[2].__setitem__(0, -1e300), r"target 2, entry 0 is -1e\+300"),
        ("target_logprobs", lambda v: v[2].__setitem__(0, -0.001), "target 2: .*mass"),
        ("target_mask", lambda v: v.__setitem__(-1, True), "the last one false"),
        ("label_logprob", lambda v: v.pop(), r"column label_logprob: the cell has \d+ targets"),
        ("label_logprob", lambda v: v.__setitem__(1, NAN), "column label_logprob: target 1 is nan"),
        ("label_logprob", lambda v: v.__setitem__(1, 0.4), "column label_logprob: target 1 is 0.4"),
    ],
)
def test_a_wrong_value_is_named_with_row_column_and_target(
    tmp_path: Path, column: str, change: Any, message: str
) -> None:
    rows = plain_rows(range(3))
    change(rows[1][column])
    text = refusal(write_rows(tmp_path / "rows.parquet", rows))
    assert "row 1 (counted from 0), " in text
    with pytest.raises(DataError, match=message):
        raise DataError(text)


@pytest.mark.parametrize("value", [-100, 2, 255])
def test_a_mask_of_integers_has_0_and_1_alone(tmp_path: Path, value: int) -> None:
    rows = plain_rows(range(2))
    rows[1]["target_mask"] = [int(flag) for flag in rows[1]["target_mask"]]
    rows[1]["target_mask"][4] = value
    rows[0]["target_mask"] = [int(flag) for flag in rows[0]["target_mask"]]
    text = refusal(write_rows(tmp_path / "rows.parquet", rows))
    assert f"row 1 (counted from 0), column target_mask: position 4 is {value}" in text


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 0], "column positions"),
        ([3, 2], "column positions"),
        ([2**40], "column positions"),
        ([-1, 2], "column positions"),
        ([0], "contradict each other"),
    ],
)
def test_positions_rise_within_the_sequence_and_agree_with_the_mask(
    tmp_path: Path, positions: list[int], message: str
) -> None:
    rows = plain_rows(range(2))
    for row in rows:
        row["positions"] = positions
    assert message in refusal(write_rows(tmp_path / "rows.parquet", rows))


@pytest.mark.parametrize("column", ["input_ids", "target_mask", "target_ids", "target_logprobs"])
def test_an_empty_cell_is_named(tmp_path: Path, column: str) -> None:
    rows = plain_rows(range(2))
    rows[1][column] = None
    assert f"row 1 (counted from 0), column {column}: the cell is empty" in refusal(
        write_rows(tmp_path / "rows.parquet", rows)
    )


# The tail, in every encoding


@pytest.mark.parametrize("encoding", ENCODINGS[:2] + ENCODINGS[3:])
@pytest.mark.parametrize(
    ("column", "entry", "value"),
    [
        ("tail_logsumexp", 1, NAN),
        ("tail_logsumexp", 1, INF),
        ("tail_logsumexp", 1, 9.0),
        ("tail_logsumexp", 0, NAN),
        ("tail_logprobs", 1, NAN),
        ("tail_logprobs", 1, 0.25),
        ("tail_ids", 1, VOCAB),
        ("tail_ids", 1, -1),
    ],
)
def test_a_wrong_tail_is_refused_in_every_encoding(
    tmp_path: Path, encoding: str, column: str, entry: int, value: float
) -> None:
    rows = tailed_rows()
    rows[1][column][2][entry] = value
    chosen = settings(tail_samples=2, temperatures=(1.0, 2.0), encoding=encoding)
    described = imported_manifest(chosen, VOCAB, "elsewhere", {"vocabulary": "a"})
    text = refusal(write_rows(tmp_path / "rows.parquet", rows), described)
    assert f"row 1 (counted from 0), column {column}: target 2, entry {entry} is {value}" in text


@pytest.mark.parametrize("column", ["tail_logsumexp", "tail_ids", "tail_logprobs"])
@pytest.mark.parametrize("change", [lambda v: v.pop(), lambda v: v[2].pop(), lambda v: v[2].append(v[2][0])])
def test_lists_of_the_tail_have_the_settings_lengths(tmp_path: Path, column: str, change: Any) -> None:
    rows = tailed_rows()
    change(rows[1][column])
    described = imported_manifest(TAILED, VOCAB, "elsewhere", {"vocabulary": "a"})
    text = refusal(write_rows(tmp_path / "rows.parquet", rows), described)
    assert f"row 1 (counted from 0), column {column}: " in text


def test_a_whole_table_with_a_tail_is_imported_as_it_is(tmp_path: Path) -> None:
    described = imported_manifest(TAILED, VOCAB, "elsewhere", {"vocabulary": "a"})
    for number, found in enumerate(
        open_cache(imported(write_rows(tmp_path / "rows.parquet", tailed_rows()), described))
    ):
        made = sequence(number, TAILED).targets
        np.testing.assert_array_equal(found.targets.tail_logsumexp, made.tail_logsumexp)
        np.testing.assert_array_equal(found.targets.tail_ids, made.tail_ids)


def test_a_log_partition_is_finite(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=2, encoding="bf16_logit")
    run("export", root, "--out", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    values = table["log_partition"].to_pylist()
    values[1][3] = NAN
    place = table.column_names.index("log_partition")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(values, pa.list_(pa.float32()))),
        tmp_path / "rows.parquet",
    )
    assert "row 1 (counted from 0), column log_partition: target 3 is nan" in refusal(tmp_path / "rows.parquet", None)


# The number of entries


def test_a_table_of_another_type_has_no_number_of_entries(tmp_path: Path) -> None:
    rows = plain_rows(range(2))
    for row in rows:
        row["target_ids"] = [1] * len(row["target_ids"])
    with pytest.raises(DataError, match="column target_ids: its type is"):
        fewest_entries(write_rows(tmp_path / "rows.parquet", rows))


def test_a_target_without_an_entry_is_named_before_anything_is_imported(tmp_path: Path) -> None:
    rows = plain_rows(range(2))
    rows[1]["target_ids"][0] = []
    with pytest.raises(DataError, match="a target has no entry"):
        fewest_entries(write_rows(tmp_path / "rows.parquet", rows))
