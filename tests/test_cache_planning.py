"""Plans: which sequences go into which shards, in a new cache and in an existing one."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row, tokenised
from support.disk import Operation, Watch
from support.fake_cache import manifest, sequence, settings, write_cache
from support.stopping import written_at_once
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.capturing.engines
from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.planning import CapturePlan, plan_capture, plan_shards
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.capturing import CaptureProgress, CaptureSummary, capture
from todi_offline.data import Example, Examples
from todi_offline.errors import CacheIncompleteError, CacheMismatchError, DataError
from todi_offline.teacher.in_transformers import Teacher, as_teacher

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
    assert changed == {"cache.json", "zarr.json", *arrays}
    assert not [name for name in files if "tmp" in name or "lock" in name]
    cache = open_cache(put(files, tmp_path))
    assert verify_cache(tmp_path) == []
    first, second = cache.manifest.parts
    assert (first.recipe["source"], second.recipe["source"]) == ("old.jsonl", "more.jsonl")
    assert (first.num_sequences, second.num_sequences) == (60, 60)
    assert first.num_shards == second.num_shards == 2
    expected = [*old, *(example for number, example in enumerate(more) if not 30 <= number < 40)]
    for found, example in zip(cache, expected, strict=True):
        np.testing.assert_array_equal(found.token_ids, example.token_ids)
        np.testing.assert_array_equal(found.target_mask, example.target_mask)


def test_appended_sequences_equal_those_of_a_separate_capture(
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
    progress: list[CaptureProgress] = []
    summary = capture(teacher, both, root, progress=progress.append, **SMALL)
    assert (summary.num_known_sequences, summary.num_captured_tokens, summary.num_sequences) == (16, 0, 120)
    assert [at.num_tokens for at in progress] == [at.total_tokens for at in progress] == [both.num_tokens.sum()]
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


@pytest.mark.parametrize("step", [151, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_an_append_stopped_at_any_operation_resumes_to_the_same_bytes(
    teacher: Teacher, begun: Files, appended: tuple[Files, CaptureSummary], more: Examples, tmp_path: Path, step: int
) -> None:
    with Watch(put(begun, tmp_path / "whole")) as watch:
        run(teacher, more, tmp_path / "whole")
    found: set[int] = set()
    for number in [*range(1, len(watch.log), step), len(watch.log)]:
        root = put(begun, tmp_path / str(number))
        with Watch(root, stopping_at(number)), pytest.raises(Stopped):
            run(teacher, more, root)
        found.add(len(open_cache(root)))
        run(teacher, more, root)
        assert files_of(root) == appended[0], number
    assert found == {60, 120}


def test_appending_is_one_step(teacher: Teacher, begun: Files, more: Examples, tmp_path: Path) -> None:
    """A reader that opens the cache at any operation of an append finds the old cache or the new one, whole."""
    root, found = put(begun, tmp_path), list[int]()
    with Watch(root, lambda _: found.append(len(open_cache(root)))):
        run(teacher, more, root)
    assert set(found) == {60, 120}
    assert found == sorted(found)


def test_while_an_append_is_not_finished_readers_have_the_old_cache_and_its_own_command_is_content(
    teacher: Teacher, begun: Files, old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = interrupted(teacher, begun, more, tmp_path)
    before = files_of(root)
    assert len(open_cache(root)) == 60
    assert [len(found.token_ids) for found in open_cache(root)] == old.num_tokens.tolist()
    assert run(teacher, old, root).num_captured_tokens == 0
    assert files_of(root) == before


def interrupted(teacher: Teacher, begun: Files, more: Examples, root: Path) -> Path:
    """Append the first of two shards."""

    def after_a_shard(_: CaptureProgress) -> None:
        if len(list((root / "commits").glob("*.json"))) > 2:
            raise KeyboardInterrupt

    with written_at_once(), pytest.raises(KeyboardInterrupt):
        capture(teacher, more, put(begun, root), progress=after_a_shard, batch_tokens=256, **SMALL)
    assert sorted(path.name for path in (root / "commits").iterdir())[2:] == ["000002.json"]
    return root


def test_other_data_are_refused_until_an_append_is_finished_or_given_up(
    teacher: Teacher, begun: Files, more: Examples, conversations: list[Row], tmp_path: Path
) -> None:
    root, other = interrupted(teacher, begun, more, tmp_path), named(tokenised(conversations[150:160]), "other.jsonl")
    before = files_of(root)
    with pytest.raises(CacheMismatchError, match=r"source more\.jsonl .*is not finished"):
        run(teacher, other, root)
    assert files_of(root) == before
    repair_cache(root, abandon=True)
    assert run(teacher, other, root).num_sequences == 70
    assert [part.recipe["source"] for part in open_cache(root).manifest.parts] == ["old.jsonl", "other.jsonl"]


def test_records_of_an_unknown_append_are_refused(
    teacher: Teacher, begun: Files, more: Examples, tmp_path: Path
) -> None:
    root = interrupted(teacher, begun, more, tmp_path)
    (root / "cache.json").write_bytes(begun["cache.json"])
    with pytest.raises(CacheMismatchError, match=r"commits/000002\.json, which no root names"):
        run(teacher, more, root)


# Refused


def test_an_unfinished_cache_refuses_other_data_and_names_the_capture_to_resume(
    teacher: Teacher, old: Examples, more: Examples, tmp_path: Path
) -> None:
    def stop(_: CaptureProgress) -> None:
        if (tmp_path / "commits").exists():
            raise KeyboardInterrupt

    with written_at_once(), pytest.raises(KeyboardInterrupt):
        capture(teacher, old, tmp_path, progress=stop, batch_tokens=256, **SMALL)
    before = files_of(tmp_path)
    with pytest.raises(CacheMismatchError, match=r"source old\.jsonl .*is not finished"):
        run(teacher, more, tmp_path)
    assert files_of(tmp_path) == before


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
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights: not the same"):
        run(as_teacher(llama(seed=1), tiny_tokenizer()), more, put(begun, tmp_path))
    assert files_of(tmp_path) == begun


def test_a_capture_resumes_with_other_library_versions_and_records_them(
    teacher: Teacher, begun: Files, more: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = interrupted(teacher, begun, more, tmp_path)
    engines = todi_offline.capturing.engines
    real = engines.version
    monkeypatch.setattr(engines, "version", lambda name: "9.9" if name == "numpy" else real(name))
    run(teacher, more, root)
    first, second = open_cache(root).manifest.parts
    assert second.versions == {**first.versions, "numpy": f"{first.versions['numpy']}, 9.9"}
    before = files_of(root)
    run(teacher, more, root)  # what is finished is confirmed and stays as it is
    assert files_of(root) == before


# Repaired


def test_lost_shards_of_several_parts_are_redone_by_the_command_of_each_in_order(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, more: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    for name in ("commits/000001.json", "commits/000003.json"):
        (root / name).unlink()
    repair_cache(root)
    with pytest.raises(CacheIncompleteError, match=r"lacks commits/000001\.json.*source old\.jsonl again first"):
        run(teacher, more, root)
    with pytest.raises(CacheIncompleteError, match=r"shards \[3\] are not committed.*source more\.jsonl"):
        run(teacher, old, root)
    assert run(teacher, more, root).num_captured_tokens > 0
    assert files_of(root) == appended[0]


def test_lost_metadata_of_a_cache_of_two_parts_are_rewritten(
    teacher: Teacher, appended: tuple[Files, CaptureSummary], old: Examples, tmp_path: Path
) -> None:
    root = put(appended[0], tmp_path)
    for name in ("zarr.json", "topk_ids/zarr.json"):
        (root / name).unlink()
    run(teacher, old, root)
    assert files_of(root) == appended[0]


# The plan


def test_the_plan_fills_shards_in_order_and_never_splits_a_sequence() -> None:
    plan = plan_shards([3, 4, 5, 2, 8, 1], 8)
    assert [list(shard.examples) for shard in plan] == [[0, 1], [2, 3], [4], [5]]
    with pytest.raises(DataError, match="example 1 has 9 tokens, more than the 8"):
        plan_shards([1, 9], 8)
    with pytest.raises(DataError, match="no example to capture"):
        plan_shards([], 8)


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "planned", num_shards=2, per_shard=3)


def plan(root: Path, numbers: list[int], content: str) -> CapturePlan:
    """Plan the capture of these made-up sequences."""
    chosen = settings()
    sequences = [sequence(number, chosen) for number in numbers]
    part = dataclasses.replace(manifest(chosen).parts[0], content=content)
    fresh = dataclasses.replace(manifest(chosen), parts=(part,))
    keys = ContentKeys.of(rows.content_key for rows in sequences)
    return plan_capture(LocalStore(root), fresh, keys, np.array([len(rows.token_ids) for rows in sequences]))


def test_where_there_is_no_cache_all_is_captured(tmp_path: Path) -> None:
    found = plan(tmp_path / "nothing", [4, 4, 5], "x")
    assert found.sequences.tolist() == [0, 1, 2]
    assert [(shard.index, list(shard.examples)) for shard in found.shards] == [(0, [0, 1, 2])]


def test_existing_sequences_are_skipped_and_new_shards_come_after_the_old(planned: Path) -> None:
    found = plan(planned, [2, 9, 5, 8], "x")
    assert found.sequences.tolist() == [1, 3]
    assert [(shard.index, list(shard.examples)) for shard in found.shards] == [(2, [0, 1])]
    assert (len(found.manifest.parts), found.manifest.num_shards) == (2, 3)


def test_data_that_are_all_held_plan_nothing(planned: Path) -> None:
    found = plan(planned, [2, 0], "x")
    assert (found.sequences.tolist(), found.shards) == ([], [])
    assert found.manifest == open_cache(planned).manifest


def test_the_data_of_a_finished_part_in_other_shards_lacks_nothing(planned: Path) -> None:
    found = plan(planned, list(range(6)), "c")  # the fake cache has two shards where a capture would make one
    assert (found.sequences.tolist(), found.shards) == (list(range(6)), [])
    assert found.manifest == open_cache(planned).manifest
