"""Named sequences of operations on caches with many sequences: each result equals a fresh capture."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.composing import TINY, Entry, assert_holds, capture_into, digest_of, key_of, length_of
from support.damage import contents_of
from support.fake_cache import settings
from support.stopping import StoppedError

from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.choosing import choose
from todi_offline.cache.convert.export import export_cache
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.format.layout import ENCODINGS
from todi_offline.cache.format.manifest import identity_differences
from todi_offline.cache.reader import open_cache, union
from todi_offline.errors import CacheIncompleteError, CacheMismatchError

STRETCH = 20  # a shard of a capture has a few sequences


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here loses power


def captured(root: Path, numbers: Sequence[int], **changes: Any) -> Path:
    capture_into(root, numbers, settings(codec="fast", **changes), stretch=STRETCH)
    return root


def subset_of(root: Path, out: Path, expression: str | None = None, **changes: Any) -> Path:
    cache = open_cache(root)
    chosen, recipe = choose(cache, None, None, None, expression, None)
    subset_cache(cache, str(out), chosen, recipe, **changes)
    return out


def merged(out: Path, *places: Path) -> Path:
    merge_caches([str(place) for place in places], str(out))
    return out


def imported(root: Path, out: Path) -> Path:
    export_cache(open_cache(root), out.with_suffix(".parquet"))
    import_table(out.with_suffix(".parquet"), str(out))
    return out


LONGER = "num_tokens > 40"
FIRST, SECOND, ALL = (0, 100, 3, 152891), (4, 3, 5, 129, 6), (0, 100, 3, 152891, 4, 5, 129, 6)
LONG = tuple(number for number in FIRST if length_of(number) > 40)


def both(at: Path) -> Path:
    return merged(at / "m", captured(at / "a", FIRST), captured(at / "b", SECOND))


def appended(root: Path) -> Path:
    return captured(root, SECOND)


CHAINS: dict[str, tuple[Callable[[Path], Path], Sequence[int]]] = {
    "merge of a subset": (
        lambda at: merged(at / "c", subset_of(captured(at / "a", FIRST), at / "s", LONGER), captured(at / "b", SECOND)),
        tuple(dict.fromkeys((*LONG, *SECOND))),
    ),
    "subset of a merge": (
        lambda at: subset_of(both(at), at / "c", LONGER),
        tuple(number for number in ALL if length_of(number) > 40),
    ),
    "append to a merge": (
        lambda at: appended(merged(at / "c", captured(at / "a", FIRST[:2]), captured(at / "b", FIRST[2:]))),
        ALL,
    ),
    "append to a subset": (lambda at: appended(subset_of(captured(at / "a", FIRST), at / "c")), ALL),
    "append to an imported cache": (lambda at: appended(imported(captured(at / "a", FIRST), at / "c")), ALL),
    "export of an append": (lambda at: imported(appended(captured(at / "a", FIRST)), at / "c"), ALL),
    "merge of an imported cache": (
        lambda at: merged(at / "c", imported(captured(at / "a", FIRST), at / "i"), captured(at / "b", SECOND)),
        ALL,
    ),
    "subset of an import of an append": (
        lambda at: subset_of(imported(appended(captured(at / "a", FIRST)), at / "i"), at / "c"),
        ALL,
    ),
    "merge of a merge": (lambda at: merged(at / "c", both(at), at / "b"), ALL),
    "subset of a subset": (lambda at: subset_of(subset_of(captured(at / "a", ALL), at / "s"), at / "c"), ALL),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_an_operation_on_the_output_of_another_equals_a_fresh_capture(
    tmp_path: Path, chain: tuple[Callable[[Path], Path], Sequence[int]]
) -> None:
    make, numbers = chain
    root = make(tmp_path)
    assert verify_cache(root) == []
    fresh = open_cache(captured(tmp_path / "fresh", numbers))
    found = open_cache(root)
    assert found.content_keys == fresh.content_keys
    assert found.content_keys.digest() == digest_of(numbers)
    assert identity_differences(found.manifest, fresh.manifest, ("found", "fresh")) == []
    for mine, other in zip(found, fresh, strict=True):
        np.testing.assert_array_equal(mine.token_ids, other.token_ids)
        np.testing.assert_array_equal(mine.target_mask, other.target_mask)
        assert mine.targets.arrays().keys() == other.targets.arrays().keys()
        for name, values in other.targets.arrays().items():
            np.testing.assert_array_equal(mine.targets.arrays()[name], values)


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "merge": lambda at: merged(at / "c", at / "a", at / "b"),
        "subset": lambda at: subset_of(at / "a", at / "c"),
        "import": lambda at: imported(at / "a", at / "c"),
    }.items(),
)
def test_what_made_a_cache_mends_it_after_a_capture_has_added_to_it(
    tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    first = captured(tmp_path / "a", FIRST)
    captured(tmp_path / "b", SECOND[:2])
    root = make(tmp_path)
    appended(root)
    whole = contents_of(root)
    make(tmp_path)  # finds nothing to do
    assert contents_of(root) == whole
    (root / "label_logprob/c/0").unlink()
    (root / "label_logprob" / "c" / str(len(open_cache(first).members[0].records()))).unlink(missing_ok=True)
    assert repair_cache(root).lost
    with contextlib.suppress(CacheIncompleteError):  # a shard of the append is still missing
        make(tmp_path)
    appended(root)
    assert contents_of(root) == whole
    assert verify_cache(root) == []


def test_a_capture_of_what_was_imported_into_other_shards_does_nothing(tmp_path: Path) -> None:
    root = imported(captured(tmp_path / "a", range(12)), tmp_path / "b")
    before = contents_of(root)
    assert open_cache(root).manifest.num_shards == 1
    captured(root, range(12))
    assert contents_of(root) == before


def test_a_reused_subset_gives_the_rows_of_the_subset_and_captures_the_others(tmp_path: Path) -> None:
    narrow = {"k": 4, "tail_samples": 2}
    source = subset_of(captured(tmp_path / "a", FIRST), tmp_path / "s", **narrow)
    asked = settings(codec="fast", **narrow)
    capture_into(tmp_path / "c", ALL, asked, [source], stretch=STRETCH)
    assert verify_cache(tmp_path / "c") == []
    origins = {number: settings(codec="fast") if number in FIRST else asked for number in ALL}
    assert_holds(open_cache(tmp_path / "c"), [Entry.captured(number, origins[number]) for number in ALL])


def test_a_union_with_a_subset_has_the_settings_that_both_share(tmp_path: Path) -> None:
    source = subset_of(captured(tmp_path / "a", FIRST), tmp_path / "s", LONGER, k=3, temperatures=(2.0, 1.0))
    found = union([open_cache(source), open_cache(captured(tmp_path / "b", ALL))])
    numbers = tuple(dict.fromkeys((*LONG, *ALL)))
    assert_holds(found, [Entry.captured(number, settings(codec="fast")) for number in numbers])


@pytest.mark.parametrize(
    ("changes", "refused"),
    [({"k": 4}, "k: "), ({"encoding": "q8"}, "encoding: "), ({"tail_samples": 0}, "tail_samples: ")],
    ids=["k", "encoding", "samples"],
)
def test_caches_that_do_not_fit_are_refused_with_a_solution(
    tmp_path: Path, changes: dict[str, Any], refused: str
) -> None:
    small = subset_of(captured(tmp_path / "a", FIRST), tmp_path / "s", **changes)
    with pytest.raises(CacheMismatchError, match=refused) as of_append:
        captured(small, SECOND)
    assert "choose another folder" in str(of_append.value)
    with pytest.raises(CacheMismatchError, match=refused) as of_merge:
        merged(tmp_path / "c", small, tmp_path / "a")
    assert "todi-cache subset" in str(of_merge.value)
    with pytest.raises(CacheMismatchError, match="cannot be reused") as of_reuse:
        capture_into(tmp_path / "c", ALL, settings(codec="fast", k=6), [small])
    assert "leave it out of --reuse" in str(of_reuse.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_a_narrowed_cache_of_every_encoding_is_whole(tmp_path: Path, encoding: str, k: int) -> None:
    root = captured(tmp_path / "a", range(12), encoding=encoding, k=12)
    assert verify_cache(subset_of(root, tmp_path / "s", k=k)) == []
    assert verify_cache(subset_of(tmp_path / "s", tmp_path / "t", k=1)) == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_cache_of_samples_alone_goes_through_every_operation(tmp_path: Path, encoding: str) -> None:
    asked = settings(k=0, encoding=encoding, codec="fast")
    root = captured(tmp_path / "a", FIRST, k=0, encoding=encoding)
    captured(root, SECOND, k=0, encoding=encoding)
    assert not any((root / name).exists() for name in ("topk_ids", "topk_logprobs", "log_partition"))
    other = captured(tmp_path / "b", ALL[3:], k=0, encoding=encoding)
    wide = captured(tmp_path / "w", ALL, encoding=encoding)
    merged(tmp_path / "m", root, other)
    subset_of(tmp_path / "m", tmp_path / "s", LONGER)
    imported(root, tmp_path / "i")
    subset_of(wide, tmp_path / "n", k=0)
    capture_into(tmp_path / "r", ALL, asked, [wide, other], stretch=STRETCH)
    for name in "amsinr":
        assert verify_cache(tmp_path / name) == []
    alone = [Entry.captured(number, asked) for number in ALL]
    narrowed = [Entry.captured(number, settings(encoding=encoding, codec="fast")) for number in ALL]
    assert_holds(open_cache(root), alone)
    assert_holds(open_cache(tmp_path / "i"), alone)
    assert_holds(open_cache(tmp_path / "m"), alone)
    assert_holds(open_cache(tmp_path / "s"), [entry for entry in alone if length_of(entry.number) > 40])
    assert_holds(open_cache(tmp_path / "n"), narrowed)
    assert_holds(open_cache(tmp_path / "r"), [*narrowed[:3], *alone[3:]])  # rows that need no narrowing come first
    assert_holds(union([open_cache(wide), open_cache(other)]), narrowed)


@pytest.mark.parametrize("found", ["q8", "root8"])
@pytest.mark.parametrize("asked", ENCODINGS)
def test_values_of_a_coarse_encoding_are_not_stored_in_another(tmp_path: Path, found: str, asked: str) -> None:
    root = captured(tmp_path / "a", FIRST, encoding=found)
    if asked == found:
        assert verify_cache(subset_of(root, tmp_path / "s", encoding=asked)) == []
        return
    with pytest.raises(CacheMismatchError, match=f"keep {found}"):
        subset_of(root, tmp_path / "s", encoding=asked)
    assert not (tmp_path / "s").exists()


def test_a_capture_that_was_killed_while_it_appended_leaves_a_cache_without_problems(tmp_path: Path) -> None:
    root = captured(tmp_path / "a", FIRST)
    with pytest.raises(StoppedError):
        capture_into(root, ALL, settings(codec="fast"), stop_after=1, stretch=STRETCH)
    assert [problem for problem in verify_cache(root) if not problem.is_note] == []


# Many sequences


@pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_operations_take_thousands_of_sequences(tmp_path: Path, count: int) -> None:
    chosen = settings(codec="fast", k=2, tail_samples=1, temperatures=(1.0,), shard_tokens=4096)
    thousands = [TINY + number for number in range(count)]
    half, other = thousands[: count // 2], thousands[count // 2 :]
    assert sum(key_of(number)[-1] == 0 for number in thousands) > 1
    for name, numbers in {"a": half, "b": other}.items():
        capture_into(tmp_path / name, numbers, chosen)
    digest = digest_of(thousands)
    merged(tmp_path / "m", tmp_path / "a", tmp_path / "b", tmp_path / "a")
    assert open_cache(tmp_path / "m").content_keys.digest() == digest
    (tmp_path / "keys").write_text("".join(f"{key_of(number).hex()}\n" for number in thousands[::2]))
    cache = open_cache(tmp_path / "m")
    chosen_rows, recipe = choose(cache, None, tmp_path / "keys", None, None, None)
    subset_cache(cache, str(tmp_path / "s"), chosen_rows, recipe, k=1)
    assert open_cache(tmp_path / "s").content_keys.digest() == digest_of(thousands[::2])
    capture_into(tmp_path / "a", thousands, chosen)
    assert open_cache(tmp_path / "a").content_keys.digest() == digest
    capture_into(tmp_path / "r", thousands, dataclasses.replace(chosen, k=1), [tmp_path / "b", tmp_path / "s"])
    assert open_cache(tmp_path / "r").content_keys.digest() == digest
    joined = union([open_cache(tmp_path / name) for name in ("b", "a", "s")])
    assert joined.content_keys.digest() == digest_of([*other, *half])
    for name in "mar":
        assert verify_cache(tmp_path / name) == []
    assert_holds(joined[::97], [Entry.captured(number, chosen) for number in [*other, *half][::97]])
