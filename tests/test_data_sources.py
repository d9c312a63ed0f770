"""Sources of rows: every kind of file, folders, the hub, and rows that are already loaded."""

import csv
import json
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import CHAT, PLAIN, ROWS, THREE_TURNS, encode, marked, write_jsonl

from todi_offline.data import (
    ALPACA,
    ALPACA_WITH_INPUT,
    DataConfig,
    examples_from_rows,
    load_examples,
)
from todi_offline.errors import DataError


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, rows, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": lambda path, rows: path.write_text(" \n" + json.dumps(rows, indent=1)),
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "rows.arrow": write_arrow,
    "stream.arrow": lambda path, rows: write_arrow(path, rows, pa.ipc.new_stream),
    "ROWS.JSONL": write_jsonl,
    "folder": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_examples(name, tmp_path):
    WRITERS[name](tmp_path / name, ROWS)
    examples = load_examples(DataConfig(data=str(tmp_path / name)), PLAIN)
    assert [marked(example, PLAIN) for example in examples] == [marked(example, PLAIN) for example in encode(ROWS)]
    assert [example.id for example in examples] == [f"{name}:0", f"{name}:1", f"{name}:2"]
    assert {example.source for example in examples} == {name}
    assert examples.recipe["source"] == name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "folder"])
def test_every_kind_of_nested_file_gives_the_same_conversations(name, tmp_path):
    rows = [{"messages": THREE_TURNS}, {"messages": [{"role": "system", "content": "Hm."}, *THREE_TURNS]}]
    WRITERS[name](tmp_path / name, rows)
    examples = load_examples(DataConfig(data=str(tmp_path / name)), CHAT)
    assert [marked(example, CHAT) for example in examples] == [marked(example, CHAT) for example in encode(rows, CHAT)]


def test_a_csv_file_holds_texts_even_if_they_look_like_numbers_or_nulls(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,input,output\n2 + 2,,4\nNo?,NA,null\n" + "x,y," + "z" * 200_000)
    first, second, third = load_examples(DataConfig(data=str(tmp_path / "rows.csv")), PLAIN)
    assert marked(first, PLAIN) == ALPACA.format(instruction="2 + 2") + "[4<|endoftext|>]"
    assert marked(second, PLAIN) == ALPACA_WITH_INPUT.format(instruction="No?", input="NA") + "[null<|endoftext|>]"
    assert len(third.token_ids) == 1024


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text": "b"\n',
            r"line 2 is not valid JSON \(.*\); expected one object a line",
        ),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', r"row 1 .*: the row is a list; expected columns"),
        ("rows.jsonl", b'{"text": "\xff"}\n', r"cannot be read: .*utf-8"),
        ("rows.json", b'[{"text": "a"},', "cannot be read: .*line 1"),
        ("rows.json", b'{\n "data": []\n}', "line 1 is not valid JSON"),
        ("rows.jsonl", b"", "rows.jsonl has no rows"),
        ("rows.json", b"[]", "rows.json has no rows"),
        ("rows.csv", b"", "rows.csv has no rows"),
        ("rows.csv", b"text,more\na,b,c\n", "the row that ends in line 2 has more or fewer fields than the header"),
        ("rows.csv", b"text,more\na\n", "the row that ends in line 2 has more or fewer fields than the header"),
        ("rows.parquet", b"nonsense", "cannot be read"),
        ("rows.arrow", b"nonsense, too", "cannot be read"),
        ("rows.arrow", b"", "cannot be read"),
        (
            "rows.doc",
            b"Hello",
            r"has no known suffix; expected one of .jsonl, .json, .csv, .parquet, .arrow, .txt",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(DataConfig(data=str(tmp_path / name)), PLAIN)


@pytest.mark.parametrize("name", ["/no/such/file.jsonl", "no/such/folder/at/all", "./nowhere", "file.CSV", "a b"])
def test_a_missing_file_or_folder_is_named(name):
    with pytest.raises(DataError, match=f"there is no file or folder {name}; expected one, a hub id, or stdlib"):
        load_examples(DataConfig(data=name), PLAIN)


def test_a_folder_that_was_not_saved_by_datasets_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is not a folder that `datasets` saved .*name a file within it"):
        load_examples(DataConfig(data=str(tmp_path)), PLAIN)


@pytest.fixture
def splits(tmp_path):
    """A folder with two splits, one row in the one and two in the other."""
    folder = tmp_path / "saved"
    parts = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_the_default_split_is_train(splits):
    assert len(load_examples(DataConfig(data=str(splits)), PLAIN)) == 1
    examples = load_examples(DataConfig(data=str(splits), split="test"), PLAIN)
    assert [example.id for example in examples] == ["saved/test:0", "saved/test:1"]
    assert (examples.recipe["source"], examples.recipe["split"]) == ("saved", "test")


def test_the_only_split_needs_no_name_and_several_splits_need_one(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "one")
    assert len(load_examples(DataConfig(data=str(tmp_path / "one")), PLAIN)) == 3
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two has several splits; choose one of: a, b"):
        load_examples(DataConfig(data=str(tmp_path / "two")), PLAIN)


def test_a_missing_split_is_refused_with_a_list_of_the_splits(splits, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for where, found in (
        (str(splits), "train, test"),
        (str(tmp_path / "rows.jsonl"), "train"),
        ("stdlib", "train, heldout"),
    ):
        with pytest.raises(DataError, match=f"has no split 'dev'; choose one of: {found}"):
            load_examples(DataConfig(data=where, split="dev"), PLAIN)


def test_limit_reads_only_the_first_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\nnonsense")
    examples = load_examples(DataConfig(data=str(tmp_path / "rows.jsonl"), limit=2), PLAIN)
    assert (len(examples), examples.report.num_rows, examples.recipe["limit"]) == (2, 2, 2)


def test_datasets_loads_a_hub_id_with_its_only_split(monkeypatch):
    def load_dataset(name, subset, split, streaming, **where):
        assert (name, subset, split, where) == ("someone/rows", None, "train", {})
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples(DataConfig(data="someone/rows"), PLAIN)
    assert (len(examples), examples[0].source, examples.recipe["source"]) == (3, "someone/rows/train", "someone/rows")


def test_a_hub_data_set_has_subsets_and_revisions_and_can_be_streamed(monkeypatch):
    def split_names(name, subset, revision):
        assert (name, subset, revision) == ("someone/rows", "small", "v2")
        return ["train"]

    def load_dataset(name, subset, split, streaming, revision):
        assert (name, subset, split, streaming, revision) == ("someone/rows", "small", "train", True, "v2")
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(data="someone/rows", subset="small", data_revision="v2", streaming=True, limit=2)
    examples = load_examples(config, PLAIN)
    assert len(examples) == 2
    assert (examples.recipe["subset"], examples.recipe["revision"]) == ("small", "v2")


def test_the_paragraphs_of_a_text_file_are_texts(tmp_path):
    (tmp_path / "book.txt").write_text("\n\nOnce upon\n  a time.\n \n\nThe end.\n", encoding="utf-8")
    examples = load_examples(DataConfig(data=str(tmp_path / "book.txt")), PLAIN)
    assert [marked(example, PLAIN) for example in examples] == [
        "O[nce upon\n  a time.<|endoftext|>]",
        "The[ end.<|endoftext|>]",
    ]


def test_an_error_of_the_hub_is_one_line(monkeypatch):
    def refuse(*_):
        raise ConnectionError("the hub cannot be reached\nand so on")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(DataError, match=r"someone/rows is not a file or folder here, .*: the hub cannot be reached; "):
        load_examples(DataConfig(data="someone/rows"), PLAIN)


def test_datasets_caches_nothing_and_its_progress_bars_are_restored(splits, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    before = sorted(splits.rglob("*"))
    load_examples(DataConfig(data=str(splits)), PLAIN)
    assert not datasets.are_progress_bars_disabled()
    assert sorted(splits.rglob("*")) == before
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "")


def test_the_embedded_data_set_needs_no_name_and_has_two_splits():
    examples = load_examples(DataConfig(limit=20), CHAT)
    heldout = load_examples(DataConfig(split="heldout", limit=20), CHAT)
    assert {example.source for example in examples} == {"stdlib/train"}
    assert {example.source for example in heldout} == {"stdlib/heldout"}
    assert not {example.id for example in examples} & {example.id for example in heldout}
    assert (examples.recipe["form"], examples.recipe["template"]) == ("instruction + output", "chat")
    assert examples.recipe["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_rows_may_come_from_a_dataset_in_any_format_or_from_a_generator():
    dataset = datasets.Dataset.from_list(ROWS)
    expected = [example.token_ids.tolist() for example in encode(ROWS)]
    for rows in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset(), (row for row in ROWS)):
        examples = examples_from_rows(rows, DataConfig(), PLAIN, source="mine")
        assert [example.token_ids.tolist() for example in examples] == expected
        assert examples[2].id == "mine:2"


def test_the_folder_dot_is_named_after_the_folder(splits, monkeypatch):
    monkeypatch.chdir(splits)
    assert load_examples(DataConfig(data="."), PLAIN)[0].source == "saved/train"
