"""Captures into a cache that is there: what is new lies behind what is old, which nothing touches."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row, tokenised
from support.disk import Operation, Watch
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.capturing
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.reader import open_cache
from todi_offline.capturing import CaptureSummary, capture
from todi_offline.data import Example, Examples
from todi_offline.errors import CacheError, CacheIncompleteError, CacheMismatchError
from todi_offline.teacher import Teacher, as_teacher

SMALL: dict[str, Any] = {"k": 4, "tail_samples": 1, "shard_tokens": 4096, "codec": "fast"}

Files = dict[str, bytes]


def files_of(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def named(examples: Iterable[Example], source: str) -> Examples:
    renamed = [dataclasses.replace(example, id=f"{source}:{number}") for number, example in enumerate(examples)]
    return Examples.from_list(renamed, {"source": source, "limit": None})


@pytest.fixture(scope="module")
def old(conversations: list[Row]) -> Examples:
    """Two shards."""
    return named(tokenised(conversations[:60]), "old.jsonl")


@pytest.fixture(scope="module")
def more(conversations: list[Row], old: Examples) -> Examples:
    """Some of the old and much that is new, mixed: two shards more."""
    fresh = list(tokenised(conversations[60:120]))
    return named([*fresh[:30], *list(old)[10:20], *fresh[30:]], "more.jsonl")


def run(teacher: Teacher, examples: Examples, out: Path, **settings: Any) -> CaptureSummary:
    return capture(teacher, examples, out, **(SMALL | settings))


@pytest.fixture(scope="module")
def begun(teacher: Teacher, old: Examples, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("begun")
    run(teacher, old, root)
    return files_of(root)


@pytest.fixture(scope="module")
def appended(
    teacher: Teacher, begun: Files, more: Examples, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Files, CaptureSummary]:
    root = put(begun, tmp_path_factory.mktemp("appended"))
    summary = run(teacher, more, root)
    return files_of(root), summary


def put(files: Files, root: Path) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_more_data_become_new_shards_behind_the_old_and_nothing_old_is_touched(
    begun: Files, appended: tuple[Files, CaptureSummary], old: Examples, more: Examples, tmp_path: Path
) -> None:
    files, summary = appended
    assert summary.num_known_sequences == 10
    assert summary.num_sequences == len(old) + len(more) - 10
    assert summary.num_captured_tokens == int(more.num_tokens.sum() - old.num_tokens[10:20].sum())
    changed = {name for name, data in begun.items() if files[name] != data}
    arrays = {name for name in begun if name.endswith("/zarr.json")}
    assert changed == {"sealed.json", "zarr.json", *arrays}
    assert not [name for name in files if "append" in name or "tmp" in name or "lock" in name]
    cache = open_cache(put(files, tmp_path))
    assert verify_cache(tmp_path) == []
    first, second = cache.manifest.parts
    assert (first.recipe["source"], second.recipe["source"]) == ("old.jsonl", "more.jsonl")
    assert (first.num_sequences, second.num_sequences) == (60, 60)
    assert first.num_shards == second.num_shards == 2
    expected = [*old, *(example for number, example in enumerate(more) if not 30 <= number < 40)]
    for sequence, example in zip(cache, expected, strict=True):
        np.testing.assert_array_equal(sequence.token_ids, example.token_ids)
        np.testing.assert_array_equal(sequence.target_mask, example.target_mask)


def test_what_is_appended_is_what_a_capture_of_it_alone_would_hold(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], more: Examples, tmp_path: Path
) -> None:
    new = [example for number, example in enumerate(more) if not 30 <= number < 40]
    run(teacher, Examples.from_list(new), tmp_path / "alone")
    alone, files = files_of(tmp_path / "alone"), appended[0]
    for name, data in alone.items():
        if name.endswith(("/c/0", "/c/0/0", "/c/1", "/c/1/0")):
            array, _, place = name.partition("/c/")
            assert data == files[f"{array}/c/{int(place[0]) + 2}{place[1:]}"], name


def test_the_command_of_each_part_confirms_it_and_does_nothing(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    for examples, num_known in ((old, 0), (more, 10), (old, 0)):
        summary = run(teacher, examples, root)
        assert (summary.num_captured_tokens, summary.num_known_sequences) == (0, num_known)
        assert summary.num_sequences == 120
        assert files_of(root) == appended[0]


def test_data_that_are_all_there_add_nothing_and_change_nothing(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    both = named([*list(old)[:7], *list(more)[:9]], "both.jsonl")
    progress: list[tuple[int, int]] = []
    summary = capture(teacher, both, root, progress=lambda *at: progress.append(at), **SMALL)
    assert (summary.num_known_sequences, summary.num_captured_tokens, summary.num_sequences) == (16, 0, 120)
    assert progress == [(int(both.num_tokens.sum()),) * 2]
    assert files_of(root) == appended[0]


def test_a_third_part_follows_the_second_and_may_be_copied(
    teacher: Teacher,
    appended: tuple[Files, CaptureSummary],
    conversations: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    third = named(tokenised(conversations[110:150]), "third.jsonl")
    for name in ("copied", "run"):
        put(appended[0], tmp_path / name)
    run(teacher, third, tmp_path / "run")
    run(teacher, third, tmp_path / "third alone", k=6, tail_samples=1)
    run(teacher, third, tmp_path / "same alone")
    with monkeypatch.context() as patched:
        patched.setattr(type(teacher.model), "forward", None)
        reuse = [str(tmp_path / "third alone"), str(tmp_path / "same alone")]
        summary = run(teacher, third, tmp_path / "copied", reuse=reuse)
    assert (summary.num_known_sequences, summary.num_captured_targets) == (10, 0)
    assert summary.num_reused_targets > 0
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "run")
    assert [part.num_sequences for part in open_cache(tmp_path / "run").manifest.parts] == [60, 60, 30]


def test_content_that_a_data_set_has_twice_stays_twice_unless_an_earlier_part_has_it(
    teacher: Teacher, begun: Files, old: Examples, conversations: list[Row], tmp_path: Path
) -> None:
    (fresh,) = tokenised(conversations[130:131])
    summary = run(teacher, named([fresh, old[3], fresh, old[3]], "twice"), put(begun, tmp_path))
    assert (summary.num_sequences, summary.num_known_sequences) == (62, 2)


# Stopped


class Stopped(BaseException):
    """What a process does no more."""


def stopping_at(number: int) -> Callable[[Operation], None]:
    """Stop at an operation of the disk, and at every one after it: a dead process tidies nothing up."""
    count = 0

    def before(_: Operation) -> None:
        nonlocal count
        count += 1
        if count >= number:
            raise Stopped

    return before


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_an_append_that_was_stopped_at_any_operation_goes_on_to_the_same_bytes(
    teacher: Teacher, begun: Files, appended: tuple[Files, CaptureSummary], more: Examples, tmp_path: Path, step: int
) -> None:
    with Watch(put(begun, tmp_path / "whole")) as watch:
        run(teacher, more, tmp_path / "whole")
    found: Counter[str] = Counter()
    for number in [*range(1, len(watch.log), step), len(watch.log)]:
        root = put(begun, tmp_path / str(number))
        with Watch(root, stopping_at(number)), pytest.raises(Stopped):
            run(teacher, more, root)
        try:
            found[f"{len(open_cache(root))} sequences"] += 1
        except CacheIncompleteError as error:
            found["between two seals" if "is between two seals" in str(error) else str(error)] += 1
        run(teacher, more, root)
        assert files_of(root) == appended[0], number
    assert set(found) == {"60 sequences", "between two seals", "120 sequences"}


def test_while_an_append_is_not_finished_readers_have_the_old_cache_and_its_own_command_is_content(
    teacher: Teacher, begun: Files, old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = interrupted(teacher, begun, more, tmp_path)
    before = files_of(root)
    assert len(open_cache(root)) == 60
    assert [len(sequence.token_ids) for sequence in open_cache(root)] == old.num_tokens.tolist()
    assert run(teacher, old, root).num_captured_tokens == 0
    assert files_of(root) == before


def interrupted(teacher: Teacher, begun: Files, more: Examples, root: Path) -> Path:
    """Append the first of two shards."""

    def after_a_shard(done: int, total: int) -> None:
        if len(list((root / "commits").iterdir())) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(teacher, more, put(begun, root), progress=after_a_shard, batch_tokens=256, **SMALL)
    assert sorted(path.name for path in (root / "commits").iterdir())[2:] == ["000002.json"]
    return root


def test_other_data_are_refused_until_an_append_is_finished_or_given_up(
    teacher: Teacher, begun: Files, more: Examples, conversations: list[Row], tmp_path: Path
) -> None:
    root, other = interrupted(teacher, begun, more, tmp_path), named(tokenised(conversations[150:160]), "other.jsonl")
    before = files_of(root)
    message = r"another capture has begun to append .*source: 'more\.jsonl' begun, 'other\.jsonl' now.* give it up"
    with pytest.raises(CacheMismatchError, match=message):
        run(teacher, other, root)
    assert files_of(root) == before
    for name in ("append.json", "commits/000002.json"):
        (root / name).unlink()
    assert run(teacher, other, root).num_sequences == 70
    assert [part.recipe["source"] for part in open_cache(root).manifest.parts] == ["old.jsonl", "other.jsonl"]


def test_records_of_an_append_that_nobody_knows_of_are_refused(
    teacher: Teacher, begun: Files, more: Examples, tmp_path: Path
) -> None:
    root = interrupted(teacher, begun, more, tmp_path)
    (root / "append.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"commits/000002\.json, of which its manifest does not know"):
        run(teacher, more, root)


# Refused


def test_an_unfinished_cache_takes_no_other_data_and_says_whose_capture_is_to_go_on(
    teacher: Teacher, begun: Files, more: Examples, tmp_path: Path
) -> None:
    root = put(begun, tmp_path)
    (root / "sealed.json").unlink()
    (root / "commits" / "000001.json").unlink()
    before = files_of(root)
    message = r"was begun otherwise: content: '\w+' in the cache, '\w+' now; recipe\.source: 'old\.jsonl' in the cache"
    with pytest.raises(CacheMismatchError, match=message):
        run(teacher, more, root)
    assert files_of(root) == before


@pytest.mark.parametrize(
    ("changes", "named"), [({"k": 5}, r"settings\.k: 4 in the cache, 5 now"), ({"tail_seed": 3}, "tail_seed")]
)
def test_more_data_with_other_settings_are_refused(
    teacher: Teacher, begun: Files, more: Examples, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CacheMismatchError, match=named):
        run(teacher, more, put(begun, tmp_path), **changes)
    assert files_of(tmp_path) == begun


def test_more_data_of_another_teacher_are_refused(begun: Files, more: Examples, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights: '\w+' in the cache, '\w+' now"):
        run(as_teacher(llama(seed=1), tiny_tokenizer()), more, put(begun, tmp_path))
    assert files_of(tmp_path) == begun


def test_other_versions_confirm_what_is_finished_and_do_not_go_on_with_what_is_not(
    teacher: Teacher, begun: Files, old: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(begun, tmp_path)
    monkeypatch.setattr(todi_offline.capturing, "version", lambda name: "9.9")
    run(teacher, old, root)
    assert files_of(root) == begun
    (root / "sealed.json").unlink()
    (root / "commits" / "000001.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"parts\.0\.versions\.torch: '[\w.+]+' in the cache, '9\.9' now"):
        run(teacher, old, root)


# Repaired


def test_lost_shards_of_several_parts_are_redone_by_the_command_of_each_in_order(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    for name in ("sealed.json", "commits/000001.json", "commits/000003.json"):
        (root / name).unlink()
    with pytest.raises(
        CacheIncompleteError, match=r"lacks commits/000001\.json.*capture source old\.jsonl again first"
    ):
        run(teacher, more, root)
    with pytest.raises(CacheIncompleteError, match=r"shards \[3\] are not committed; capture source more\.jsonl"):
        run(teacher, old, root)
    assert run(teacher, more, root).num_captured_tokens > 0
    assert files_of(root) == appended[0]


def test_lost_metadata_of_a_cache_of_two_parts_are_written_anew(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    for name in ("sealed.json", "topk_ids/zarr.json"):
        (root / name).unlink()
    run(teacher, old, root)
    assert files_of(root) == appended[0]


def test_a_cache_that_was_appended_to_while_it_was_opened_is_opened_as_one_or_the_other(
    begun: Files, appended: tuple[Files, CaptureSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(begun, tmp_path)
    genuine = todi_offline.cache.reader.read_seal

    def late(store: Any) -> Any:
        put(appended[0], root)
        return genuine(store)

    monkeypatch.setattr(todi_offline.cache.reader, "read_seal", late)
    cache = open_cache(root)
    assert (len(cache), len(cache.manifest.parts)) == (120, 2)


def test_a_seal_and_a_manifest_of_different_parts_are_not_read(
    begun: Files, appended: tuple[Files, CaptureSummary], tmp_path: Path
) -> None:
    root = put(appended[0] | {"sealed.json": begun["sealed.json"]}, tmp_path)
    with pytest.raises(CacheError, match=r"zarr\.json is not what was written"):
        open_cache(root)
    (root / "append.json").write_bytes(appended[0]["zarr.json"])
    with pytest.raises(CacheIncompleteError, match="between two seals"):
        open_cache(root)
