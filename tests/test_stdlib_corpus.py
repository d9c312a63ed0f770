"""The embedded data set: the same in every process, readable, and without side effects of importing modules."""

import builtins
import json
import logging
import subprocess
import sys
from dataclasses import asdict

import pytest

from todi_offline.data import stdlib_corpus
from todi_offline.data.stdlib_corpus import MAX_CHARS, MIN_CHARS, MODULES, stdlib_pairs
from todi_offline.errors import DataError


@pytest.fixture
def fresh():
    """Clear the cached corpus before and after the test."""
    stdlib_corpus._entries.cache_clear()
    yield
    stdlib_corpus._entries.cache_clear()


def test_there_are_about_a_million_characters_in_about_fourteen_hundred_pairs():
    pairs = stdlib_pairs("train") + stdlib_pairs("heldout")
    assert 1_200 < len(pairs) < 1_800
    assert 800_000 < sum(len(pair.response) for pair in pairs) < 1_300_000


def test_about_a_tenth_is_held_out_and_shares_no_text_or_name_with_train():
    train, heldout = stdlib_pairs("train"), stdlib_pairs("heldout")
    assert 0.06 < len(heldout) / (len(train) + len(heldout)) < 0.14
    assert not {pair.response for pair in train} & {pair.response for pair in heldout}
    assert not {_last_name(pair.id) for pair in train} & {_last_name(pair.id) for pair in heldout}


def _last_name(identifier: str) -> str:
    name, _, _ = identifier.partition("#")
    return name.rpartition("/")[2] if "/" in name else name.rpartition(".")[2]


def test_ids_and_instructions_and_responses_are_unique():
    pairs = stdlib_pairs("train") + stdlib_pairs("heldout")
    for values in zip(*((pair.id, pair.instruction, pair.response) for pair in pairs), strict=True):
        assert len(set(values)) == len(pairs)


def test_responses_are_clean_and_of_a_readable_length():
    for pair in stdlib_pairs("train") + stdlib_pairs("heldout"):
        assert MIN_CHARS <= len(pair.response) <= 1.5 * MAX_CHARS, pair.id
        assert pair.response.strip("\n") == pair.response, pair.id
        assert "\n\n\n" not in pair.response, pair.id
        assert " \n" not in pair.response, pair.id
        assert "\t" not in pair.response, pair.id


def test_instructions_have_many_wordings_and_contain_the_name():
    pairs = stdlib_pairs()
    assert len({pair.instruction.split("`")[0].split("“")[0] for pair in pairs}) >= 10
    assert all(_last_name(pair.id) in pair.instruction for pair in pairs)


def test_another_process_builds_the_same_pairs():
    script = (
        "import json, dataclasses, todi_offline.data.stdlib_corpus as corpus\n"
        "pairs = corpus.stdlib_pairs('train') + corpus.stdlib_pairs('heldout')\n"
        "print(json.dumps([dataclasses.asdict(pair) for pair in pairs]))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert json.loads(answer.stdout) == [asdict(pair) for pair in stdlib_pairs("train") + stdlib_pairs("heldout")]


def test_objects_that_a_package_adds_to_a_module_are_left_out(monkeypatch, fresh):
    def shout(self):
        """Log at the top of one's voice."""

    shout.__doc__ *= 20
    before = stdlib_pairs()
    stdlib_corpus._entries.cache_clear()
    monkeypatch.setattr(logging.Logger, "shout", shout, raising=False)
    assert stdlib_pairs() == before


def test_building_the_data_set_prints_and_warns_nothing():
    script = "import todi_offline.data.stdlib_corpus as corpus; corpus.stdlib_pairs()"
    answer = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, check=True, text=True)
    assert answer.stdout == answer.stderr == ""


def test_modules_with_side_effects_are_not_imported():
    assert not {"antigravity", "this", "idlelib", "turtledemo", "turtle", "test"} & set(MODULES.split())


def test_missing_modules_are_skipped(monkeypatch, fresh):
    real_import = builtins.__import__

    def without_topics(name, *args, **kwargs):
        if name == "pydoc_data.topics":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_topics)
    monkeypatch.setattr(stdlib_corpus, "MODULES", "textwrap no_such_module")
    assert {pair.id for pair in stdlib_pairs()} >= {"textwrap.dedent", "textwrap.shorten"}
    assert {pair.id.split(".")[0] for pair in stdlib_pairs()} == {"textwrap"}


def test_an_unknown_split_is_refused_with_a_list_of_the_splits():
    with pytest.raises(DataError, match="no split 'test'; its splits are train, heldout"):
        stdlib_pairs("test")


def test_the_parts_of_a_text_join_into_the_whole_text():
    text = "\n\n".join(f"Paragraph {number}. " + "word " * (number * 7 % 90) for number in range(60))
    parts = stdlib_corpus._parts(text)
    assert len(parts) > 1
    assert "\n\n".join(part.strip("\n") for part in parts) == text
