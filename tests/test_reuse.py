"""Captures that copy sequences from other caches: the teacher reads only the others, and the bytes are the same."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row, tokenised
from support.fake_cache import forge_rows
from support.stopping import written_at_once
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.capturing.engines
from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.format.layout import ENCODINGS
from todi_offline.cache.reader import open_cache
from todi_offline.capturing import CaptureProgress, capture
from todi_offline.data import Example, Examples
from todi_offline.errors import CacheCorruptError, CacheFormatError, CacheMismatchError
from todi_offline.teacher.in_transformers import Teacher, as_teacher

SMALL: dict[str, Any] = {
    "k": 8,
    "tail_samples": 4,
    "shard_tokens": 4096,
    "codec": "fast",
    "encoding": "f16",
    "batch_tokens": 1024,
}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def some(examples: Examples, chosen: Callable[[int], bool]) -> Examples:
    return Examples.from_list([example for number, example in enumerate(examples) if chosen(number)], {"form": "some"})


@pytest.fixture(scope="module")
def whole(conversations: list[Row]) -> Examples:
    """A hundred examples, in three of the smallest shards."""
    return tokenised(conversations[:100])


@pytest.fixture(scope="module")
def nine_tenths(teacher: Teacher, whole: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of all but every tenth of them, in an order and in shards of its own."""
    part = some(whole, lambda number: number % 10 != 3)
    backwards = Examples.from_list(reversed(list(part)))
    root = tmp_path_factory.mktemp("nine tenths")
    capture(teacher, backwards, root, **(SMALL | {"shard_tokens": 8192, "codec": "balanced"}))
    return root


class Watch:
    """What the teacher is asked to read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.ids: list[str] = []
        self.num_rows = 0
        genuine, forward = todi_offline.capturing.engines.queue_targets, type(model).forward

        def queue_targets(teacher: Teacher, examples: Sequence[Example], *args: Any) -> Any:
            self.ids += [example.id for example in examples]
            return genuine(teacher, examples, *args)

        def counting(model: Any, *args: Any, **inputs: Any) -> Any:
            self.num_rows += len(inputs["input_ids"])
            return forward(model, *args, **inputs)

        monkeypatch.setattr(todi_offline.capturing.engines, "queue_targets", queue_targets)
        monkeypatch.setattr(type(model), "forward", counting)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, teacher: Teacher) -> Iterator[Watch]:
    return Watch(monkeypatch, teacher.model)


def test_with_nine_tenths_at_hand_the_teacher_reads_one_tenth_and_the_bytes_are_the_same(
    teacher: Teacher, whole: Examples, nine_tenths: Path, tmp_path: Path, watch: Watch
) -> None:
    summary = capture(teacher, whole, tmp_path / "reused", reuse=[str(nine_tenths)], **SMALL)
    tenth = [example for number, example in enumerate(whole) if number % 10 == 3]
    assert sorted(watch.ids) == sorted(example.id for example in tenth)
    assert watch.num_rows == len(tenth) == 10
    assert summary.num_captured_tokens == sum(len(example.token_ids) for example in tenth)
    assert summary.num_captured_targets == sum(int(example.target_mask.sum()) for example in tenth)
    assert summary.num_captured_targets + summary.num_reused_targets == summary.num_targets
    fresh = capture(teacher, whole, tmp_path / "fresh", **SMALL)
    assert len(list((tmp_path / "fresh" / "commits").iterdir())) == 3
    assert (fresh.num_reused_targets, fresh.num_captured_targets) == (0, fresh.num_targets)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_copied_sequences_equal_captured_ones_in_every_encoding(
    examples: Examples, tmp_path: Path, encoding: str, watch: Watch
) -> None:
    model = llama().bfloat16() if encoding == "bf16_logit" else llama()
    teacher, settings = as_teacher(model, tiny_tokenizer()), SMALL | {"encoding": encoding}
    capture(teacher, some(examples, lambda number: number != 7), tmp_path / "earlier", **settings)
    watch.ids.clear()
    capture(teacher, examples, tmp_path / "reused", reuse=[str(tmp_path / "earlier")], **settings)
    assert watch.ids == [examples[7].id]
    capture(teacher, examples, tmp_path / "fresh", **settings)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


def test_a_capture_of_less_is_served_by_one_of_more(
    teacher: Teacher, examples: Examples, tmp_path: Path, watch: Watch
) -> None:
    more = SMALL | {"k": 12, "temperatures": [1.0, 2.0, 4.0], "tail_samples": 8}
    less = SMALL | {"k": 5, "temperatures": [2.0, 1.0], "tail_samples": 3}
    capture(teacher, examples, tmp_path / "more", **more)
    watch.ids.clear()
    summary = capture(teacher, examples, tmp_path / "less", reuse=[str(tmp_path / "more")], **less)
    assert (watch.ids, summary.num_captured_tokens, summary.num_reused_targets) == ([], 0, summary.num_targets)
    capture(teacher, examples, tmp_path / "fresh", **less)
    for found, expected in zip(open_cache(tmp_path / "less"), open_cache(tmp_path / "fresh"), strict=True):
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        np.testing.assert_array_equal(found.targets.ids, expected.targets.ids)
        np.testing.assert_allclose(found.targets.logprobs, expected.targets.logprobs, rtol=2**-10)
        np.testing.assert_allclose(found.targets.label_logprob, expected.targets.label_logprob, rtol=1e-6)
        np.testing.assert_allclose(found.targets.tail_logsumexp, expected.targets.tail_logsumexp, atol=1e-3)
        assert not (found.targets.tail_ids[:, :, None] == found.targets.ids[:, None, :]).any()


def test_of_several_caches_the_one_with_these_very_settings_is_taken_first(
    teacher: Teacher, examples: Examples, tmp_path: Path, watch: Watch
) -> None:
    capture(teacher, examples, tmp_path / "wide", **(SMALL | {"k": 20}))
    capture(teacher, examples, tmp_path / "same", **SMALL)
    watch.ids.clear()
    reuse = [str(tmp_path / "wide"), str(tmp_path / "same")]
    capture(teacher, examples, tmp_path / "out", reuse=reuse, **SMALL)
    assert watch.ids == []
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


def test_of_an_unfinished_cache_the_committed_shards_serve(
    teacher: Teacher, whole: Examples, tmp_path: Path, watch: Watch
) -> None:
    capture(teacher, whole, tmp_path / "whole", **SMALL)
    capture(teacher, whole, tmp_path / "part", **SMALL)
    (tmp_path / "part" / "commits" / "000001.json").unlink()
    repair_cache(tmp_path / "part")
    lost = open_cache(tmp_path / "whole").sequences.to_pandas().query("shard == 1")["id"]
    watch.ids.clear()
    capture(teacher, whole, tmp_path / "out", reuse=[str(tmp_path / "part")], **SMALL)
    assert sorted(watch.ids) == sorted(lost)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stopped_capture_resumes_with_and_without_reuse(
    teacher: Teacher, whole: Examples, nine_tenths: Path, tmp_path: Path
) -> None:
    capture(teacher, whole, tmp_path / "fresh", **SMALL)

    def stopping(at: CaptureProgress) -> None:
        if at.num_tokens > 0.6 * at.total_tokens:
            raise KeyboardInterrupt

    for first, second in (([str(nine_tenths)], []), ([], [str(nine_tenths)])):
        out = tmp_path / f"out {len(first)}"
        with written_at_once(), pytest.raises(KeyboardInterrupt):
            capture(teacher, whole, out, reuse=first, progress=stopping, **SMALL)
        assert 0 < len(list((out / "commits").iterdir())) < 3
        summary = capture(teacher, whole, out, reuse=second, **SMALL)
        assert summary.num_captured_targets + summary.num_reused_targets < summary.num_targets
        assert contents(out) == contents(tmp_path / "fresh")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"k": 9}, "k: 8 in the cache, 9 requested"),
    ({"temperatures": [1.0, 3.0]}, r"temperatures: \(1\.0, 2\.0\) in the cache, \(1\.0, 3\.0\) requested"),
    ({"tail_samples": 5}, "tail_samples: 4 in the cache, 5 requested"),
    ({"tail_temperature": 2.0}, "tail_temperature: 1.0 in the cache, 2.0 requested"),
    ({"tail_seed": 1}, "tail_seed: 0 in the cache, 1 requested"),
    ({"encoding": "q8"}, "encoding: 'f16' in the cache, 'q8' requested.*todi-cache subset"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_cache_that_holds_less_or_otherwise_is_refused_with_both_values_before_anything_runs(
    teacher: Teacher, whole: Examples, nine_tenths: Path, tmp_path: Path, changes: Any, message: str, watch: Watch
) -> None:
    with pytest.raises(CacheMismatchError, match=f"nine.tenths.* cannot be reused: {message}"):
        capture(teacher, whole, tmp_path / "out", reuse=[str(nine_tenths)], **(SMALL | changes))
    assert watch.num_rows == 0
    assert not (tmp_path / "out").exists()


def test_without_samples_it_does_not_matter_how_samples_were_drawn(
    teacher: Teacher, examples: Examples, nine_tenths: Path, tmp_path: Path
) -> None:
    settings = SMALL | {"tail_samples": 0, "tail_seed": 5}
    summary = capture(teacher, examples, tmp_path / "out", reuse=[str(nine_tenths)], **settings)
    assert summary.num_reused_targets > 0


def test_the_cache_of_another_teacher_tokenizer_or_vocabulary_is_refused(
    teacher: Teacher, whole: Examples, nine_tenths: Path, tmp_path: Path
) -> None:
    others = {
        r"teacher\.weights: not the same": as_teacher(llama(seed=1), tiny_tokenizer()),
        r"tokenizer\.special_ids: not the same": as_teacher(teacher.model, tiny_tokenizer(chat=False)),
        "vocab_size: 512 there, 513 here": dataclasses.replace(teacher, vocab_size=513),
    }
    for message, other in others.items():
        with pytest.raises(CacheMismatchError, match=message):
            capture(other, whole, tmp_path / "out", reuse=[str(nine_tenths)], **SMALL)
    with pytest.raises(CacheFormatError, match="is not a cache"):
        capture(teacher, whole, tmp_path / "out", reuse=[str(tmp_path / "nothing")], **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_cache_with_other_tokens_under_a_content_key_is_not_copied_from(
    teacher: Teacher, examples: Examples, tmp_path: Path
) -> None:
    capture(teacher, examples, tmp_path / "earlier", **SMALL)
    forge_rows(tmp_path / "earlier", "token_ids", lambda rows: rows.__setitem__(0, rows[0] ^ 1))
    with pytest.raises(
        CacheCorruptError, match=f"earlier has other tokens under the content key of '{examples[0].id}'"
    ):
        capture(teacher, examples, tmp_path / "out", reuse=[str(tmp_path / "earlier")], **SMALL)


def test_a_damaged_cache_is_not_copied_from(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    capture(teacher, examples, tmp_path / "earlier", **SMALL)
    file = tmp_path / "earlier" / "tail_logsumexp" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheCorruptError, match=r"earlier.*chunk 0 .*tail_logsumexp/c/0/0 is damaged"):
        capture(teacher, examples, tmp_path / "out", reuse=[str(tmp_path / "earlier")], **SMALL)
    assert not (tmp_path / "out" / "commits").exists()
