"""Large data sets are tokenised once, by any number of processes, and later runs reuse the result."""

import json
import os

import numpy as np
import pytest
from support.rows import CHAT, THREE_TURNS, encode, write_jsonl

from todi_offline.data import DataConfig, encoding, forms, keeping, load_examples
from todi_offline.errors import DataError

ROWS = [{"messages": [*THREE_TURNS[:3], {"role": "assistant", "content": f"In {n}."}]} for n in range(110)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A config of a file that is large enough to keep its examples."""
    monkeypatch.setattr(keeping, "KEEP_ROWS", 100)
    monkeypatch.setattr(encoding, "BATCH_ROWS", 40)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return {"data": str(tmp_path / "rows.jsonl"), "examples_dir": tmp_path / "kept"}


def assert_same_examples(one, other):
    assert len(one) == len(other)
    assert one.report == other.report
    assert one.recipe == other.recipe
    assert one.content_keys().digest() == other.content_keys().digest()
    for mine, theirs in zip(one, other, strict=True):
        assert mine.id == theirs.id
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.target_mask, theirs.target_mask)


def test_two_processes_make_the_same_examples_in_the_same_order(data):
    other = DataConfig(data=data["data"], examples_dir=data["examples_dir"] / "other", num_proc=2)
    assert_same_examples(load_examples(other, CHAT), load_examples(DataConfig(**data), CHAT))


@pytest.mark.slow
def test_an_error_in_another_process_names_the_row(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_ROWS", 40)
    with pytest.raises(DataError, match=r"rows, row 103 \(counted from 0\): the row is a list"):
        encode([*ROWS[:103], ["Hi"]], CHAT, num_proc=2)


def test_a_later_run_reuses_the_examples_and_tokenises_nothing(data, monkeypatch):
    first = load_examples(DataConfig(**data), CHAT)
    monkeypatch.setattr("todi_offline.data.loading.encoded_batches", None)
    assert_same_examples(load_examples(DataConfig(**data, num_proc=2), CHAT), first)


@pytest.mark.parametrize("change", [{"max_length": 100}, {"limit": 105}, {"supervise": "last"}])
def test_another_setting_tokenises_again(data, change):
    first = load_examples(DataConfig(**data), CHAT)
    other = load_examples(DataConfig(**data, **change), CHAT)
    assert other.recipe != first.recipe
    assert len(list(data["examples_dir"].glob("*.arrow"))) == 2


def test_another_template_or_file_tokenises_again(data, tmp_path):
    load_examples(DataConfig(**data), CHAT)
    template = CHAT.chat_template.replace("assistant", "helper")
    load_examples(DataConfig(**data, chat_template=template), CHAT)
    os.utime(tmp_path / "rows.jsonl", ns=(1, 1))
    load_examples(DataConfig(**data), CHAT)
    assert len(list(data["examples_dir"].glob("*.arrow"))) == 3


def test_a_table_without_its_facts_is_incomplete_and_is_written_again(data):
    first = load_examples(DataConfig(**data), CHAT)
    (facts,) = data["examples_dir"].glob("*.json")
    assert json.loads(facts.read_text())["recipe"] == first.recipe
    facts.unlink()
    assert_same_examples(load_examples(DataConfig(**data), CHAT), first)
    assert facts.exists()
    assert not list(data["examples_dir"].glob("*.partial"))


def test_small_data_sets_are_not_kept(data, monkeypatch):
    monkeypatch.setattr(keeping, "KEEP_ROWS", 10_000)
    load_examples(DataConfig(**data), CHAT)
    assert not data["examples_dir"].exists()


def test_a_new_form_needs_one_entry_in_the_table(monkeypatch):
    form = forms.Form("haiku", ("haiku",), lambda encoder, row: forms.FORMS[-1].encode(encoder, {"text": row["haiku"]}))
    monkeypatch.setattr(forms, "FORMS", (form, *forms.FORMS))
    assert encode([{"haiku": "An old silent pond"}]).recipe["form"] == "haiku"
