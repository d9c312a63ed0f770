"""A note on an attempt at a shard is small, checked like any object, and never taken for a part of the cache."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_cache import manifest, sequence, settings, write_cache

from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.names import attempt_key, record_key
from todi_offline.cache.format.notes import MAX_NOTE_BYTES, Note
from todi_offline.cache.objects import noted_shards, read_note
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheLockedError

NUMBERS = st.integers(0, 9)
NOTE = Note(shard=2, num_examples=12, ended=(None, 5), num_read=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing for real."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@given(
    st.lists(st.none() | NUMBERS, max_size=40),
    st.integers(0, 10),
    st.sets(NUMBERS),
    st.booleans(),
)
def test_a_note_comes_back_with_its_last_deaths(
    ended: list[int | None], num_read: int, left_out: set[int], was_named: bool
) -> None:
    note = Note(
        shard=7,
        num_examples=10,
        ended=tuple(ended[-16:]),
        num_read=num_read,
        left_out=tuple(sorted(left_out)),
        was_named=was_named,
    )
    longer = Note(**{name: getattr(note, name) for name in Note.__slots__} | {"ended": tuple(ended)})
    assert Note.from_bytes(longer.to_bytes(), 7, "here") == note


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": 3},
        {"num_examples": -1},
        {"num_examples": True},
        {"num_read": 13},
        {"ended": [12]},
        {"ended": [0.5]},
        {"ended": ["5"]},
        {"ended": "five"},
        {"ended": [None] * 17},
        {"left_out": [3, 3]},
        {"left_out": [4, 3]},
        {"left_out": [99]},
        {"left_out": None},
        {"was_named": 1},
        {"more": 0},
    ],
)
def test_a_note_that_says_anything_else_is_refused(changes: dict[str, Any]) -> None:
    values = json.loads(NOTE.to_bytes()) | changes
    with pytest.raises(CacheFormatError, match=r"^here is not a note on shard 2: .*; `todi-cache repair` deletes it$"):
        Note.from_bytes(json.dumps(values).encode(), 2, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_note_are_refused(data: bytes) -> None:
    with pytest.raises(CacheFormatError, match="is not a note on shard 2"):
        Note.from_bytes(data, 2, "here")


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    yield str(tmp_path / "cache") if request.param == "folder" else f"memory:/{tmp_path}/cache"
    fsspec.filesystem("memory").store.clear()


def begun(place: str | Path) -> CacheWriter:
    """The writer of a cache of three shards, of which the first one is committed once it is entered."""
    chosen = settings()
    writer = CacheWriter(place, manifest(chosen, 3, 3))
    with writer:
        if 0 in writer.missing_shards():
            writer.write_shard(0, [sequence(0, chosen)])
    return writer


def test_notes_are_found_by_the_next_run_and_are_gone_after_the_seal(place: str) -> None:
    writer = begun(place)
    with writer:
        for shard in (0, 2):
            writer.shards.write_note(Note(shard=shard, num_examples=1, ended=(None,)))
    again = begun(place)
    with again:
        assert again.notes() == {2: Note(shard=2, num_examples=1, ended=(None,))}
        assert noted_shards(again.store) == [2]  # shard 0 was committed
        for shard in again.missing_shards():
            again.write_shard(shard, [sequence(shard, settings())])
        again.seal()
    assert noted_shards(again.store) == []
    assert verify_cache(place) == []
    assert open_cache(place).manifest.num_shards == 3


def test_a_note_is_replaced_and_deleted_by_the_holder_of_the_lock_alone(place: str) -> None:
    writer = begun(place)
    with writer:
        shards = writer.shards
        shards.write_note(NOTE)
        shards.write_note(Note(shard=2, num_examples=1, ended=()))
        assert writer.notes()[2].ended == ()
        shards.delete_note(2)
        shards.delete_note(2)
        assert writer.notes() == {}
    with pytest.raises(CacheLockedError):
        shards.write_note(NOTE)
    shards.restore_note(NOTE)  # an attempt that is given up when the lock is released
    shards.delete_note(2)
    assert noted_shards(shards.store) == []


def test_a_stalled_process_leaves_the_notes_of_its_successor_alone(place: str) -> None:
    stalled = begun(place)
    with stalled:
        shards = stalled.shards
    successor = begun(place)
    with successor:
        successor.shards.write_note(NOTE)
        with pytest.raises(CacheLockedError, match="was taken over by process"):
            shards.delete_note(2)
        with pytest.raises(CacheLockedError, match="was taken over by process"):
            shards.restore_note(Note(shard=2, num_examples=12, ended=()))
        assert read_note(successor.store, 2) == NOTE


def test_of_an_unfinished_cache_a_note_is_no_damage_and_a_repair_leaves_it(tmp_path: Path) -> None:
    with begun(tmp_path / "cache") as writer:
        writer.shards.write_note(NOTE)
    (problem,) = (problem for problem in verify_cache(tmp_path / "cache") if problem.where == attempt_key(2))
    assert problem.is_note
    assert (problem.what, problem.remedy.drop) == ("a capture has begun this shard and has not committed it", ())
    assert repair_cache(tmp_path / "cache").deleted == ()
    assert len(open_cache(tmp_path / "cache", allow_unsealed=True)) == 1


def test_a_note_that_a_running_capture_deletes_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(tmp_path / "cache") as writer:
        writer.shards.write_note(NOTE)
        real = LocalStore.read

        def late(store: LocalStore, key: str, limit: int | None = None) -> bytes:
            if key == attempt_key(2):
                writer.shards.delete_note(2)
            return real(store, key, limit)

        monkeypatch.setattr(LocalStore, "read", late)
        assert attempt_key(2) not in {problem.where for problem in verify_cache(tmp_path / "cache")}
        assert noted_shards(writer.store) == []


@pytest.mark.parametrize("data", [b"{}", b"x" * (MAX_NOTE_BYTES + 1)])
def test_a_damaged_note_is_refused_and_a_repair_deletes_it(tmp_path: Path, data: bytes) -> None:
    root = tmp_path / "cache"
    begun(root)
    (root / attempt_key(1)).write_bytes(data)
    with begun(root) as writer, pytest.raises((CacheFormatError, CacheCorruptError)):
        writer.notes()
    (problem,) = (problem for problem in verify_cache(root) if problem.where == attempt_key(1))
    assert not problem.is_note
    assert repair_cache(root).deleted == (attempt_key(1),)
    with begun(root) as writer:
        assert writer.notes() == {}


def test_notes_at_other_shards_than_missing_ones_are_left_behind_and_say_nothing(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    for shard in (1, 9):
        (root / attempt_key(shard)).write_text("anything")
    problems = verify_cache(root)
    assert [(problem.where, problem.is_note) for problem in problems] == [
        (attempt_key(1), True),
        (attempt_key(9), True),
    ]
    assert len(open_cache(root)) == 24
    assert repair_cache(root).deleted == (attempt_key(1), attempt_key(9))
    assert verify_cache(root) == []


def test_an_unfinished_capture_is_given_up_with_its_notes(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    chosen = settings()
    parts = (*manifest(chosen, 2, 24).parts, manifest(chosen, 1, 1).parts[0])
    whole = manifest(chosen, 2, 24)
    with CacheWriter(root, type(whole)(**_values(whole) | {"parts": parts})) as writer:
        writer.shards.write_note(Note(shard=2, num_examples=1, ended=(None,)))
    repair_cache(root, abandon=True)
    assert noted_shards(LocalStore(root)) == []
    assert verify_cache(root) == []


def _values(of: Any) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}


def test_a_shard_that_is_lost_and_begun_again_keeps_its_note(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (root / record_key(1)).unlink()
    repair_cache(root)
    with CacheWriter(root, manifest(settings(), 2, 24)) as writer:
        writer.shards.write_note(Note(shard=1, num_examples=12, ended=(None,)))
        assert list(writer.notes()) == [1]
    assert repair_cache(root).deleted == ()
    assert noted_shards(LocalStore(root)) == [1]


def test_a_note_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    begun(tmp_path / "cache")
    (tmp_path / "cache" / attempt_key(1)).symlink_to("/dev/zero")
    with begun(tmp_path / "cache") as writer, pytest.raises(CacheError, match="not a regular file"):
        writer.notes()
