"""The notes of a process: they are gone after a commit, an error or a signal, and stay after a death."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import Row, tokenised
from support.fake_ray import DiedError
from support.poison import Poisoned
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.capturing.in_process
from todi_offline.cache.format.notes import Note
from todi_offline.cache.objects import committed_shards, noted_shards, read_note
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import open_store
from todi_offline.capturing import capture
from todi_offline.capturing.engines import TransformersEngine
from todi_offline.capturing.notes import Notes
from todi_offline.data import Examples
from todi_offline.errors import CacheError, TodiError
from todi_offline.teacher.in_transformers import Teacher, as_teacher

SMALL: dict[str, Any] = {"k": 4, "tail_samples": 1, "shard_tokens": 4096, "codec": "fast", "batch_tokens": 1024}


class Recorded:
    """Stands for a `ShardWriter`: its notes are in memory."""

    def __init__(self) -> None:
        self.notes: dict[int, Note] = {}
        self.is_broken = False

    def write_note(self, note: Note) -> None:
        self._fail()
        self.notes[note.shard] = note

    def restore_note(self, note: Note) -> None:
        self.write_note(note)

    def delete_note(self, shard: int) -> None:
        self._fail()
        self.notes.pop(shard, None)

    def _fail(self) -> None:
        if self.is_broken:
            raise CacheError("no disk")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing for real."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def note(shard: int, *ended: int | None) -> Note:
    return Note(shard=shard, num_examples=9, ended=ended)


def test_a_note_lasts_until_the_shard_is_committed() -> None:
    writer = Recorded()
    with Notes(writer) as notes:  # type: ignore[arg-type]
        notes.begin(note(0, None), None)
        notes.begin(note(1, None), None)
        assert writer.notes == {0: note(0, None), 1: note(1, None)}
        notes.end(0)
        assert writer.notes == {1: note(1, None)}
        notes.end(1)
    assert writer.notes == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_ends_the_work_without_a_death_takes_the_notes_back(error: type[BaseException]) -> None:
    writer = Recorded()
    notes = Notes(writer)  # type: ignore[arg-type]

    def work() -> None:
        with notes:
            notes.begin(note(0, None), None)
            notes.begin(note(1, None, 4), note(1, None))
            notes.keep(note(2, 3, 3))
            raise error

    with pytest.raises(error):
        work()
    assert writer.notes == {1: note(1, None), 2: note(2, 3, 3)}
    notes.begin(note(3, None), None)  # a thread that has not noticed
    assert 3 not in writer.notes


def test_a_store_that_fails_at_the_end_hides_no_error() -> None:
    writer = Recorded()
    notes = Notes(writer)  # type: ignore[arg-type]
    notes.begin(note(0, None), None)
    writer.is_broken = True
    with pytest.raises(KeyboardInterrupt), notes:
        raise KeyboardInterrupt


# In a capture. A death is an exception here after which nothing is taken back.


@pytest.fixture(scope="module")
def small_teacher() -> Teacher:
    return as_teacher(llama(num_hidden_layers=1), tiny_tokenizer())


@pytest.fixture(scope="module")
def many(conversations: list[Row]) -> Examples:
    return tokenised(conversations[:60])


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "cache") if request.param == "folder" else f"memory:/{tmp_path}/cache"
    fsspec.filesystem("memory").store.clear()


def objects_in(place: str) -> dict[str, bytes]:
    store = open_store(place)
    return {key: store.read(key, 2**26) for key in store.find() if key != ".lock"}


def test_an_example_that_ends_its_process_is_named_then_left_out_or_survived(
    place: str, tmp_path: Path, many: Examples, small_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    capture(small_teacher, many, whole, **SMALL)
    table = open_cache(whole).sequences.to_pandas().query("shard == 1")
    poison, first = str(table["id"].iloc[4]), str(table["id"].iloc[0])
    engine = TransformersEngine(small_teacher, SMALL["batch_tokens"])
    store = open_store(place)

    def run(example: str, error: BaseException, **settings: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(todi_offline.capturing.in_process, "load_engine", lambda *_: Poisoned(engine, example, error))
            if isinstance(error, DiedError):
                patch.setattr(Notes, "stop", lambda _: None)
            capture(small_teacher, many, place, **SMALL, **settings)

    for error, example, ended in [
        (DiedError(), poison, (None,)),
        (KeyboardInterrupt(), first, (None,)),
        (DiedError(), poison, (None, 4)),
        (KeyboardInterrupt(), poison, (None, 4)),
        (DiedError(), poison, (None, 4, 4)),
    ]:
        with pytest.raises(type(error)):
            run(example, error)
        assert read_note(store, 1).ended == ended
        assert 1 not in committed_shards(store)
    with pytest.raises(TodiError, match=rf"^each worker that read example '{poison}' of shard 1 died: the last"):
        run(poison, DiedError())
    assert len(committed_shards(store)) == len(committed_shards(open_store(whole))) - 1
    with pytest.raises(DiedError):  # the user has not changed a thing
        run(poison, DiedError())
    with pytest.raises(TodiError, match="each worker that read example"):
        run(poison, DiedError())
    run("", DiedError())  # the cause is gone
    assert objects_in(place) == objects_in(str(whole))
    assert noted_shards(store) == []


def test_examples_that_end_their_processes_are_left_out_with_skip_failed(
    place: str, many: Examples, small_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(small_teacher, many, tmp_path / "whole", **SMALL)
    shard = open_cache(tmp_path / "whole").sequences.to_pandas().query("shard == 0")["id"].tolist()
    left_out = [shard[1], shard[2], shard[-1]]
    engine = TransformersEngine(small_teacher, SMALL["batch_tokens"])
    for example in left_out:
        engine = Poisoned(engine, example, DiedError())  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(todi_offline.capturing.in_process, "load_engine", lambda *_: engine)
        patch.setattr(Notes, "stop", lambda _: None)
        for _ in range(7):  # the shard, then each example twice
            with pytest.raises(DiedError):
                capture(small_teacher, many, place, skip_failed=True, **SMALL)
        summary = capture(small_teacher, many, place, skip_failed=True, **SMALL)
    assert summary.left_out == dict.fromkeys(left_out, "each worker that read it died")
    assert noted_shards(open_store(place)) == []


def test_an_error_of_the_teacher_leaves_no_note(
    place: str, many: Examples, small_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Poisoned(TransformersEngine(small_teacher, 1024), many[0].id, RuntimeError("no kernel for this"))
    monkeypatch.setattr(todi_offline.capturing.in_process, "load_engine", lambda *_: broken)
    with pytest.raises(TodiError, match="no kernel for this"):
        capture(small_teacher, many, place, **SMALL)
    assert noted_shards(open_store(place)) == []
