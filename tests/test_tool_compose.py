"""`todi-cache merge`, `subset` and `diff`: the resulting caches hold each sequence once, with its targets."""

import dataclasses
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.fake_cache import manifest, sequence, settings, write_cache
from support.tools import run

from todi_offline.cache.check.diff import bucketed_kl
from todi_offline.cache.convert.choosing import where
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.format.keys import content_key
from todi_offline.cache.format.layout import ENCODINGS, CacheSettings
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.objects import read_root
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.store import open_store
from todi_offline.cache.writer import CacheWriter
from todi_offline.errors import CacheMismatchError, ConfigError, TargetsError


def write_shards(root: Path, shards: list[range], **changes: object) -> Path:
    """Write a cache whose shards hold the fake sequences of these numbers."""
    chosen = settings(**changes)
    with CacheWriter(root, manifest(chosen, len(shards), sum(map(len, shards)))) as writer:
        for number in writer.missing_shards():
            writer.write_shard(number, [sequence(each, chosen) for each in shards[number]])
        writer.seal()
    return root


def assert_holds(cache: Cache, numbers: list[int], chosen: CacheSettings | None = None) -> None:
    """Assert that a cache holds the fake sequences of these numbers, in order and narrowed to its settings."""
    assert cache.sequences["id"].to_pylist() == [f"fake:{number}" for number in numbers]
    for number, found in zip(numbers, cache, strict=True):
        made = sequence(number, chosen or cache.manifest.settings)
        np.testing.assert_array_equal(found.token_ids, made.token_ids)
        key = content_key(made.token_ids, made.target_mask)
        expected = narrow(made.targets, cache.manifest.settings, key).arrays()
        for name, values in expected.items():
            np.testing.assert_allclose(found.targets.arrays()[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_merged_cache_holds_each_sequence_once_and_links_whole_shards(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", [range(8), range(8, 14)])
    second = write_shards(tmp_path / "b", [range(4, 10), range(10, 18), range(20, 25)])
    text = run("merge", first, second, "--out", tmp_path / "c").output
    assert "23 sequences" in text
    assert "shards: 3 linked, 1 written anew" in text
    assert "left out: 10 sequences" in text
    assert_holds(open_cache(tmp_path / "c"), [*range(18), *range(20, 25)])
    assert "is whole" in run("verify", tmp_path / "c").output
    for mine, source in {"c/1/0": first / "topk_ids/c/1/0", "c/3/0": second / "topk_ids/c/2/0"}.items():
        assert (tmp_path / "c/topk_ids" / mine).samefile(source)
    parts = open_cache(tmp_path / "c").manifest.parts
    assert [(part.num_shards, part.num_sequences) for part in parts] == [(2, 14), (2, 9)]


def test_a_stopped_merge_resumes_to_the_same_cache(tmp_path: Path) -> None:
    places = [str(write_cache(tmp_path / "a")), str(write_shards(tmp_path / "b", [range(20, 30), range(30, 35)]))]
    merge_caches(places, str(tmp_path / "whole"))
    merge_caches(places, str(tmp_path / "parts"))
    root = read_root(open_store(tmp_path / "parts"))
    begun = dataclasses.replace(
        root, manifest=dataclasses.replace(root.manifest, parts=()), commits=(), pending=root.manifest.parts
    )
    (tmp_path / "parts/cache.json").write_bytes(begun.to_bytes())
    for key in ("commits/000001.json", "commits/000003.json"):
        (tmp_path / "parts" / key).unlink()
    merge_caches(places, str(tmp_path / "parts"))
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert all((tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


def test_caches_of_other_settings_are_not_merged(tmp_path: Path) -> None:
    first, second = write_cache(tmp_path / "a"), write_cache(tmp_path / "b", k=4)
    with pytest.raises(CacheMismatchError, match=r"settings\.k: 4 in .*b, 6 in .*a; if only settings differ"):
        merge_caches([str(first), str(second)], str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_subset_is_chosen_by_ids_content_condition_and_number_at_once(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (tmp_path / "ids").write_text("".join(f"fake:{number}\n" for number in range(2, 20)))
    keys = open_cache(root).content_keys.to_hex()[4:24]
    (tmp_path / "keys").write_text("".join(f"{key}\n" for key in keys))
    like = write_shards(tmp_path / "like", [range(6, 40)])
    chosen = ("--ids", tmp_path / "ids", "--keys", tmp_path / "keys", "--like", like, "--where", "num_tokens > 20")
    found = json.loads(run("subset", root, *chosen, "--limit", 5, "--out", tmp_path / "small", "--json").stdout)
    lengths = open_cache(root).num_tokens
    expected = [number for number in range(6, 20) if lengths[number] > 20][:5]
    assert (found["sequences"], found["of"]) == (5, 24)
    assert_holds(open_cache(tmp_path / "small"), expected)
    assert "is whole" in run("verify", tmp_path / "small").output
    again = run("subset", root, *chosen, "--limit", 5, "--out", tmp_path / "small").output
    assert "5 of 24 sequences" in again


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_a_subset_holds_less_of_each_target_and_other_shards(tmp_path: Path, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", num_shards=1, per_shard=24, shard_tokens=8192)
    options = ("--k", 4, "--temperature", 2.0, "--tail-samples", 0, "--codec", "fast", "--shard-tokens", 4096)
    run("subset", root, *options, "--encoding", encoding, "--out", tmp_path / "small")
    small = open_cache(tmp_path / "small")
    assert small.manifest.settings.temperatures == (2.0,)
    assert "is whole" in run("verify", tmp_path / "small").output
    if encoding == "f16":
        assert_holds(small, list(range(24)), settings())
    else:
        for found, original in zip(small, open_cache(root), strict=True):
            apart = np.abs(found.targets.logprobs - original.targets.logprobs[:, :4])
            assert apart.max() <= 1 / 32 + 1e-6


def test_nothing_chosen_and_more_than_is_held_are_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=r"no sequence of .* \(it has 24\) meets the conditions"):
        run("subset", root, "--where", "num_tokens < 0", "--out", tmp_path / "small")
    with pytest.raises(CacheMismatchError, match="the cache holds k = 6, not 7"):
        run("subset", root, "--k", 7, "--out", tmp_path / "small")
    (tmp_path / "ids").write_text("fake:1\nno such\n")
    with pytest.raises(CacheMismatchError, match="has no sequence 'no such'"):
        run("subset", root, "--ids", tmp_path / "ids", "--out", tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("num_tokens > 50 and num_tokens <= 80", lambda c: (c["num_tokens"] > 50) & (c["num_tokens"] <= 80)),
        ("50 < num_tokens <= 80", lambda c: (c["num_tokens"] > 50) & (c["num_tokens"] <= 80)),
        ("not teacher_nll < 2 or topk_mass > .5", lambda c: ~(c["teacher_nll"] < 2) | (c["topk_mass"] > 0.5)),
        ("num_targets / num_tokens > 0.7 - -0.0", lambda c: c["num_targets"] / c["num_tokens"] > 0.7),
        ("id == 'fake:3' or source != 'fake'", lambda c: c["id"] == "fake:3"),
    ],
)
def test_conditions_have_the_meaning_of_python(tmp_path: Path, expression: str, expected: object) -> None:
    cache = open_cache(write_cache(tmp_path / "cache"))
    columns = {name: cache.sequences[name].to_numpy() for name in cache.sequences.column_names if name != "content_key"}
    assert callable(expected)
    np.testing.assert_array_equal(where(cache, expression), expected(columns))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "num_tokens.real > 1",
        "x > 1",
        "num_tokens ** 9 > 1",
        "num_tokens[0] > 1",
        "lambda: 1",
        "id > 1",
        "None == 1",
        "num_tokens",
        "1 > 0",
        "(",
        "",
        "-" * 10_000 + "1 > 0",
    ],
)
def test_a_condition_is_no_program(tmp_path: Path, expression: str) -> None:
    cache = open_cache(write_cache(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=re.escape("teacher_nll < 2.5")):
        where(cache, expression)


def test_diff_reports_the_manifests_and_contents_of_two_caches(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", [range(10)])
    same = write_shards(tmp_path / "b", [range(10)])
    assert "in both: 10 sequences, 0 of them with different targets" in run("diff", first, same).output
    other = write_shards(tmp_path / "c", [range(4, 12)], encoding="q8")
    found = json.loads(run("diff", first, other, "--json", code=1).stdout)
    assert "settings.encoding: 'f16' first, 'q8' second" in found["manifest"]
    assert (found["only_first"], found["only_second"], found["shared"]) == (4, 2, 6)
    assert found["only_second_ids"] == ["fake:10", "fake:11"]
    assert found["targets"]["differing"] == 6
    assert 0 < found["targets"]["largest_difference"] <= 1 / 32 + 0.01
    text = run("diff", first, other, code=1).output
    assert "only in the first: 4 sequences: fake:0, fake:1, fake:2, fake:3" in text


def test_diff_names_the_captures_that_only_one_cache_has_in_words(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", [range(10)])
    merged = tmp_path / "merged"
    run("merge", first, write_shards(tmp_path / "b", [range(10, 14)]), "--out", merged)
    text = run("diff", first, merged, code=1).output
    assert "manifest  parts.1: only second: 4 sequences, source fake\n" in text
    assert "versions" not in text


def test_the_mean_kl_of_two_caches_is_that_of_their_distributions(tmp_path: Path) -> None:
    """Over the ids that both keep and one entry for the rest; here they keep others, in another order."""
    first, second = sequence(3, settings(k=40)).targets, sequence(3, settings(k=44), scale=2).targets
    beyond = np.logaddexp.reduce(second.logprobs[:, :4], axis=1, keepdims=True)
    second = dataclasses.replace(
        second,
        ids=second.ids[:, :3:-1],
        logprobs=second.logprobs[:, :3:-1],
        tail_logsumexp=np.logaddexp(second.tail_logsumexp, beyond),
    )
    for target, kl in enumerate(bucketed_kl(first, second)):
        p, q = (
            dict(zip(rows.ids[target].tolist(), np.exp(np.float64(rows.logprobs[target])), strict=True))
            for rows in (first, second)
        )
        shared = p.keys() & q.keys()
        assert 30 < len(shared) < 40
        rest_p, rest_q = (1 - sum(mass[number] for number in shared) for mass in (p, q))
        expected = sum(p[n] * np.log(p[n] / q[n]) for n in shared) + rest_p * np.log(rest_p / rest_q)
        assert kl == pytest.approx(expected, rel=1e-4)
    assert bucketed_kl(first, first) == pytest.approx(0, abs=1e-12)


def test_the_memory_of_a_comparison_does_not_grow_with_the_square_of_k() -> None:
    num_targets, k = 64, 8192
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(k, dtype=np.uint32), (num_targets, 1)), axis=1)
    rows = TargetRows(
        ids=ids,
        logprobs=np.full((num_targets, k), -np.log(2 * k), np.float32),
        tail_logsumexp=np.full((num_targets, 1), -np.log(2), np.float32),
        label_logprob=np.full(num_targets, -9, np.float32),
        temperatures=(1.0,),
    )
    tracemalloc.start()
    kl = bucketed_kl(rows, dataclasses.replace(rows, ids=ids[:, ::-1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kl == pytest.approx(0, abs=1e-9)
    assert peak < 2**25


@pytest.mark.parametrize("k", [6, 0])
def test_an_encoding_that_needs_more_than_the_cache_holds_is_refused_before_writing(tmp_path: Path, k: int) -> None:
    """Without entries too: the tail of rounded log-probs is not as exact as that of logits."""
    root = write_cache(tmp_path / "cache")
    with pytest.raises(TargetsError, match="not the logits that bf16_logit keeps"):
        run("subset", root, "--encoding", "bf16_logit", "--k", k, "--out", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_from_the_encoding_of_logits_all_others_can_be_had(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", encoding="bf16_logit")
    for encoding in ENCODINGS:
        text = run("subset", root, "--encoding", encoding, "--k", 4, "--out", tmp_path / encoding).output
        assert ("rounded twice" in text) == (encoding != "bf16_logit")
        assert "is whole" in run("verify", tmp_path / encoding).output
        assert json.loads(run("diff", root, tmp_path / encoding, "--json", code=1).stdout)["targets"]["mean_kl"] < 0.02


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    first, second = write_cache(tmp_path / "a"), write_shards(tmp_path / "b", [range(20, 30)])
    calls: list[tuple[int, int]] = []
    merge_caches([str(first), str(second)], str(tmp_path / "c"), lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    merge_caches([str(first), str(second)], str(tmp_path / "c"), lambda done, total: calls.append((done, total)))
    assert calls[4:] == [(0, 0)]


def test_the_tools_work_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    place = f"memory://{tmp_path.name}"
    root = write_cache(tmp_path / "cache", num_shards=3, per_shard=8)
    run("subset", root, "--limit", 16, "--shard-tokens", 4096, "--out", f"{place}/a")
    run("merge", f"{place}/a", root, "--out", f"{place}/b")
    found = json.loads(run("diff", root, f"{place}/b", "--json", code=1).stdout)
    assert (found["only_first"], found["only_second"], found["targets"]["differing"]) == (0, 0, 0)
    store = open_store(f"{place}/b")
    store.write("topk_ids/c/0/0", b"nothing")
    store.write("stray", b"")
    assert "topk_ids/c/0/0" in run("verify", f"{place}/b", code=1).output
    assert re.search(r"^run the capture of .* again: it ", run("repair", f"{place}/b").output, re.M)
    run("merge", f"{place}/a", root, "--out", f"{place}/b")
    assert "is whole: 24 sequences" in run("verify", f"{place}/b").output
    run("export", f"{place}/b", "--out", tmp_path / "rows.parquet")
    run("import", tmp_path / "rows.parquet", "--out", f"{place}/c")
    assert "is whole: 24 sequences" in run("verify", f"{place}/c").output
