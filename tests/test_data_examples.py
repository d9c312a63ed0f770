"""`Example`, `Examples`, `DataReport` and `DataConfig`: types, ids, recipes and refusals."""

import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
from support.rows import PLAIN, ROWS, encode, write_jsonl

from todi_offline.data import (
    DataConfig,
    DataReport,
    Example,
    Examples,
    keeping,
    load_examples,
)
from todi_offline.errors import ConfigError, DataError


def test_the_rows_own_ids_are_kept_if_every_row_has_one_and_all_differ():
    rows = [{"id": key, **row} for key, row in zip(("a", "b", "c"), ROWS, strict=True)]
    assert [example.id for example in encode(rows)] == ["a", "b", "c"]
    assert [example.id for example in encode([row | {"id": number} for number, row in enumerate(ROWS, 7)])] == [
        "7",
        "8",
        "9",
    ]


@pytest.mark.parametrize("ids", [("a", "a", "c"), (1, "1", 2), ("a", None, "c"), (1.5, 2.5, 3.5), (True, False, 2)])
def test_ids_are_row_numbers_if_the_rows_own_ids_are_not_unique_names(ids):
    rows = [{"id": key, **row} for key, row in zip(ids, ROWS, strict=True)]
    assert [example.id for example in encode(rows)] == ["rows:0", "rows:1", "rows:2"]


def test_an_id_that_a_teacher_does_not_know_is_found_wherever_it_lies():
    rows = [np.arange(number + 1, dtype=np.uint32) for number in (3, 5, 9, 2)]
    examples = Examples.from_list(
        Example(str(number), "made", ids, np.zeros(len(ids), bool)) for number, ids in enumerate(rows)
    )
    examples.require_ids(10)
    for known, example, unknown in ((9, 2, 9), (5, 1, 5), (3, 0, 3)):
        with pytest.raises(
            DataError,
            match=f"example '{example}' holds the id {unknown}, which the tokenizer knows, but the teacher has only "
            f"{known}",
        ):
            examples.require_ids(known)


def test_examples_are_a_sequence_of_arrays_of_the_promised_types():
    examples = encode(ROWS)
    assert len(examples) == len(list(examples)) == 3
    for index, example in enumerate(examples):
        for same in (examples[index], examples[index - 3], examples[np.int64(index)]):
            assert (same.id, same.source) == (example.id, example.source)
            np.testing.assert_array_equal(same.token_ids, example.token_ids)
            np.testing.assert_array_equal(same.target_mask, example.target_mask)
        assert (example.token_ids.dtype, example.target_mask.dtype) == (np.uint32, np.bool_)
        assert not example.target_mask[-1]
    for index in (3, -4):
        with pytest.raises(IndexError):
            examples[index]
    assert examples.num_tokens.dtype == np.int64
    assert examples.num_tokens.tolist() == [len(example.token_ids) for example in examples]


def test_the_dataset_has_compact_columns():
    features = encode(ROWS).dataset.features
    assert features["token_ids"] == datasets.List(datasets.Value("uint32"))
    assert features["target_mask"] == datasets.List(datasets.Value("bool"))


def test_many_rows_are_held_in_order():
    examples = encode([{"text": f"Number {number}."} for number in range(2_345)])
    assert [example.id for example in examples] == [f"rows:{number}" for number in range(2_345)]
    assert PLAIN.decode(examples[2_000].token_ids.tolist()) == "Number 2000.<|endoftext|>"


def test_a_large_data_set_is_memory_mapped_from_a_file_that_is_already_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(keeping, "IN_MEMORY_BYTES", 10_000)
    rows = [{"id": number, "text": f"Number {number}:" + " word" * 200} for number in range(2_345)]
    bytes_before = pa.total_allocated_bytes()
    mapped = encode(rows)
    assert pa.total_allocated_bytes() - bytes_before < 100_000 < int(mapped.num_tokens.sum()) * 4
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    for one, other in zip(mapped, encode(rows), strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert pickle.loads(pickle.dumps(mapped))[-1].id == "2344"


def test_examples_can_be_built_from_a_list():
    made = list(encode(ROWS))
    examples = Examples.from_list(made, {"source": "mine"})
    assert [example.id for example in examples] == [example.id for example in made]
    assert (examples.report.num_rows, examples.report.num_examples) == (3, 3)
    assert examples.recipe == {"source": "mine"}


def test_a_list_of_examples_must_not_be_empty_and_ids_must_be_unique():
    made = list(encode(ROWS))
    with pytest.raises(DataError, match="the list of examples is empty"):
        Examples.from_list([])
    with pytest.raises(DataError, match="two examples have the id 'rows:1'"):
        Examples.from_list([*made, made[1]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros(3, np.int64), np.zeros(3, bool), r"token_ids int64\[3\]"),
        (np.zeros(3, np.uint32), np.zeros(3, np.uint8), r"target_mask uint8\[3\]"),
        (np.zeros(3, np.uint32), np.zeros(2, bool), r"target_mask bool\[2\]; expected uint32 and bool"),
        (np.zeros((1, 3), np.uint32), np.zeros((1, 3), bool), r"uint32\[1, 3\]"),
        (np.zeros(3, np.uint32), np.ones(3, bool), "supervises its last position"),
    ],
)
def test_an_invalid_example_cannot_be_built(ids, mask, message):
    with pytest.raises(DataError, match=message):
        Example("a", "mine", ids, mask)


def test_the_recipe_is_plain_json_without_a_path_and_the_same_on_every_run(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), limit=3, max_length=100, max_prompt_length=50)
    recipe = load_examples(config, PLAIN).recipe
    assert recipe == load_examples(config, PLAIN).recipe == json.loads(json.dumps(recipe))
    assert recipe == {
        "source": "rows.jsonl",
        "split": None,
        "limit": 3,
        "max_length": 100,
        "max_prompt_length": 50,
        "form": "prompt + completion",
        "template": None,
    }
    assert str(tmp_path) not in "".join(example.id + example.source for example in load_examples(config, PLAIN))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ""}, "data is empty; expected a file"),
        ({"limit": 0}, "limit is 0"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"max_length": 512, "max_prompt_length": 512}, "no token is left for a response"),
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
        ({"max_length": 100, "overlap": 51}, "overlap is 51; expected 0 to 50"),
        ({"num_proc": 0}, "num_proc is 0"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**values)


def test_the_report_is_one_line_and_cannot_be_changed():
    report = DataReport(num_rows=1_200, num_examples=1_197, num_prompts_cut=4, num_empty=1, num_unsupervised=2)
    assert str(report) == (
        "1,200 rows, 1,197 examples; 4 prompts and 0 responses cut; 3 dropped "
        "(1 empty, 2 without a supervised token, 0 with too long a prompt)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.num_rows = 0


def test_importing_the_module_imports_neither_torch_nor_transformers_nor_datasets():
    script = "import sys, todi_offline.data; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert answer.stdout == "set()\n"
