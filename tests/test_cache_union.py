"""Several caches, or some sequences of one, read like one cache."""

import dataclasses
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_cache import forge_rows, manifest, sequence, settings

from todi_offline import open_cache
from todi_offline.cache.format.keys import ContentKeys, content_key
from todi_offline.cache.format.layout import ENCODINGS
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, select, union
from todi_offline.cache.stored import StoredCache
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheCorruptError, CacheMismatchError


def cache_of(root: Path, numbers: Iterable[int], identity: dict[str, Any] | None = None, **changes: Any) -> Cache:
    """Write and open a cache of these made-up sequences, four a shard."""
    chosen, numbers = settings(codec="fast", **changes), list(numbers)
    num_shards = -(-len(numbers) // 4)
    described = dataclasses.replace(manifest(chosen, num_shards, len(numbers)), **(identity or {}))
    with CacheWriter(root, described) as writer:
        for shard in range(num_shards):
            writer.write_shard(shard, [sequence(number, chosen) for number in numbers[4 * shard :][:4]])
        writer.seal()
    return open_cache(root)


def ids_of(cache: Any) -> list[int]:
    return [int(name.removeprefix("fake:")) for name in cache.sequences["id"].to_pylist()]


def assert_same(found: CachedSequence, expected: CachedSequence) -> None:
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.target_mask, expected.target_mask)
    assert found.targets.temperatures == expected.targets.temperatures
    arrays = found.targets.arrays()
    assert arrays.keys() == expected.targets.arrays().keys()
    for name, values in expected.targets.arrays().items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_a_union_holds_each_content_once_the_first_cache_first(tmp_path: Path) -> None:
    first, second = cache_of(tmp_path / "a", [5, 1, 4, 2, 3]), cache_of(tmp_path / "b", [3, 9, 1, 8, 9, 7])
    view = union([first, second])
    assert ids_of(view) == [5, 1, 4, 2, 3, 9, 8, 7]
    assert len(view) == 8
    places = [*enumerate(range(5), 0), (5, 1), (6, 3), (7, 5)]
    for index, place in places:
        assert_same(view[index], (first if index < 5 else second)[place])
    assert_same(view[-1], second[5])
    for found, index in zip(view, range(8), strict=True):
        assert_same(found, view[index])
    with pytest.raises(IndexError):
        view[8]


def test_a_view_has_the_numbers_of_its_sequences(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(6)), cache_of(tmp_path / "b", range(4, 12))]
    view = union(caches)
    assert view.num_tokens.tolist() == [len(found.token_ids) for found in view]
    assert view.num_targets.tolist() == [len(found.targets) for found in view]
    keys = ContentKeys.of(content_key(found.token_ids, found.target_mask) for found in view)
    assert view.content_keys == keys
    expected = [-found.targets.label_logprob.mean() for found in view]
    np.testing.assert_allclose(view.columns["teacher_nll"], expected, rtol=1e-5)
    assert view.shards.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert view.root == f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert len(view.manifest.parts) == 2
    assert view.bytes_by_array["topk_ids"] == sum(cache.bytes_by_array["topk_ids"] for cache in caches)
    assert view.store is caches[0].members[0].store


def test_a_shard_of_a_view_is_prepared_in_its_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = union([cache_of(tmp_path / "a", range(6)), cache_of(tmp_path / "b", range(6, 12))])
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(StoredCache, "prepare", lambda stored, shard: asked.append((stored.store.root.name, shard)))
    for shard in np.unique(view.shards).tolist():
        view.prepare(shard)
    assert asked == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_rows_are_narrowed_to_the_settings_that_all_members_share(tmp_path: Path) -> None:
    wide = cache_of(tmp_path / "wide", range(4), k=9, temperatures=(1.0, 2.0, 4.0), tail_samples=5)
    other = cache_of(tmp_path / "other", range(2, 7), k=6, temperatures=(4.0, 1.0), tail_samples=3)
    view = union([wide, other])
    chosen = view.manifest.settings
    assert (chosen.k, chosen.temperatures, chosen.tail_samples) == (6, (1.0, 4.0), 3)
    for index in range(7):
        member = wide[index] if index < 4 else other[index - 2]
        key = content_key(member.token_ids, member.target_mask)
        expected = dataclasses.replace(member, targets=narrow(member.targets, chosen, key))
        assert_same(view[index], expected)
    asked = dataclasses.replace(chosen, k=2, tail_samples=0)
    assert union([wide, other], asked)[0].targets.ids.shape[1] == 2
    assert union([wide, other], asked)[0].targets.tail_ids is None


def test_where_one_has_no_samples_none_has(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6), tail_samples=0)]
    assert all(found.targets.tail_ids is None for found in union(caches))


def test_caches_of_different_encodings_give_rows_of_the_same_arrays(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / name, [number, number + 1], encoding=name) for number, name in enumerate(ENCODINGS)]
    view = union(caches)
    assert len(view) == len(ENCODINGS) + 1
    whole = TargetRows.concatenate([found.targets for found in view])
    assert len(whole) == view.num_targets.sum()
    assert whole.log_partition is None
    alone = union([cache for cache in caches if cache.manifest.settings.encoding == "bf16_logit"])
    assert alone[0].targets.log_partition is not None


def test_a_selection_has_exactly_these_in_this_order_and_may_repeat(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", range(5)), cache_of(tmp_path / "b", range(5, 9))]
    view = union(caches)
    keys = ContentKeys.of(sequence(number, settings()).content_key for number in (7, 2, 7, 0))
    chosen = select(view, view.content_keys.find(keys))
    assert ids_of(chosen) == [7, 2, 7, 0]
    assert_same(chosen[0], caches[1][2])
    assert ids_of(select(chosen, np.array([3, 0]))) == [0, 7]
    alone = select(caches[1], np.array([2, 0]))
    assert ids_of(alone) == [7, 5]
    assert_same(alone[1], caches[1][0])
    assert alone.manifest == caches[1].manifest


def test_a_view_travels_to_another_process(tmp_path: Path) -> None:
    view = union([cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6), k=4)])
    arrived = pickle.loads(pickle.dumps(view))
    for found, expected in zip(arrived, view, strict=True):
        assert_same(found, expected)


def test_an_unreadable_sequence_is_an_error_that_names_the_member(tmp_path: Path) -> None:
    view = union([cache_of(tmp_path / "a", range(3)), cache_of(tmp_path / "b", range(3, 6))])
    file = tmp_path / "b" / "topk_ids" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    view[0]
    with pytest.raises(CacheCorruptError, match=r"/b: sequence 'fake:4' \(number 1\): chunk 0 .*topk_ids"):
        view[4]
    forge_rows(tmp_path / "a", "target_mask", lambda rows: rows.__setitem__(0, 0))
    with pytest.raises(CacheCorruptError, match=r"/a: .*supervises"):
        union([open_cache(tmp_path / "a")])[0]


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"teacher": {"model_type": "other"}}, r"teacher\.model_type: 'other' in .*/b, 'fake' in .*/a.*mix teachers"),
    ({"tokenizer": {"vocabulary": "z", "merges": "b"}}, r"tokenizer\.vocabulary: 'z' in .*/b, 'a' in .*/a"),
    ({"vocab_size": 301}, r"vocab_size: 301 in .*/b, 300 in .*/a"),
]


@pytest.mark.parametrize(("identity", "message"), OTHERS)
def test_caches_of_different_teachers_tokenizers_or_vocabularies_are_refused_with_both_values(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    caches = [cache_of(tmp_path / "a", [1]), cache_of(tmp_path / "b", [2], identity)]
    with pytest.raises(CacheMismatchError, match=message):
        union(caches)
    if "teacher" in identity:
        view = union(caches, mix_teachers=True)
        assert ids_of(view) == [1, 2]
        assert view.manifest.teacher == {"mixed": [cache.manifest.teacher for cache in caches]}
    else:
        with pytest.raises(CacheMismatchError, match=message):
            union(caches, mix_teachers=True)


def test_rows_that_have_no_temperature_in_common_are_refused(tmp_path: Path) -> None:
    caches = [
        cache_of(tmp_path / "a", [1], temperatures=(1.0, 2.0), tail_samples=0),
        cache_of(tmp_path / "b", [2], temperatures=(3.0,), tail_samples=0),
    ]
    with pytest.raises(CacheMismatchError, match=r"temperatures are \(1\.0, 2\.0\) in .*/a, \(3\.0,\) in .*/b"):
        union(caches)


def test_samples_that_were_drawn_at_different_temperatures_are_refused(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path / "a", [1]), cache_of(tmp_path / "b", [2], tail_temperature=2.0)]
    with pytest.raises(CacheMismatchError, match=r"tail_temperature are 1\.0 in .*/a, 2\.0 in .*/b"):
        union(caches)


def test_a_slice_is_a_cache_of_these_sequences(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "a", range(7))
    assert isinstance(cache[0:2], Cache)
    assert ids_of(cache[0:2]) == [0, 1]
    assert ids_of(cache[::-2]) == [6, 4, 2, 0]
    assert ids_of(cache[1:][-1:]) == [6]
    assert (len(cache[5:3]), list(cache[9:])) == (0, [])
    assert_same(cache[2:5][1], cache[3])
    assert cache[2:5].num_tokens.tolist() == cache.num_tokens[2:5].tolist()


def test_an_open_cache_does_not_change_when_sequences_are_appended(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "a", range(4))
    added = dataclasses.replace(manifest(settings(codec="fast")).parts[0], content="d", num_shards=1, num_sequences=1)
    longer = dataclasses.replace(cache.manifest, parts=(*cache.manifest.parts, added))
    with CacheWriter(tmp_path / "a", longer) as writer:
        writer.write_shard(1, [sequence(9, cache.manifest.settings)])
        writer.seal()
    assert (len(cache), len(open_cache(tmp_path / "a"))) == (4, 5)
    assert [found.token_ids.tolist() for found in cache] == [found.token_ids.tolist() for found in cache[:]]
