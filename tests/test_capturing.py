"""Stage 1: the cache holds the teacher's targets, however often the capture was stopped."""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Row, tokenised
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, gpt2, llama, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import todi_offline.capturing.coordinator
import todi_offline.capturing.engines
import todi_offline.targets.rows
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import CaptureConfig, CaptureProgress, capture
from todi_offline.data import DataConfig, Example, Examples
from todi_offline.errors import (
    CacheIncompleteError,
    CacheMismatchError,
    ConfigError,
    DataError,
    TargetsError,
    TeacherOutputError,
)
from todi_offline.targets.sparse import SparseTargets
from todi_offline.teacher.in_transformers import Teacher, TeacherConfig, as_teacher, targets_of
from todi_offline.training.stream import Collator

COMPUTE = 2e-5
"""Rounding of matrix products: a padded batch against one sequence."""

SMALL: dict[str, Any] = {
    "k": 8,
    "tail_samples": 2,
    "shard_tokens": 4096,
    "codec": "fast",
    "encoding": "f16",
    "batch_tokens": 1024,
}


def plain_logprobs(model: Any, token_ids: np.ndarray[Any, Any]) -> Tensor:
    """What transformers says of one sequence by itself, in float32."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, :, :VOCAB]
    return logits.float().log_softmax(-1)


def assert_within_encoding(stored: Tensor, exact: Tensor, encoding: str) -> None:
    """The bounds that cache/encoding.py states."""
    if encoding == "f16":
        bound = exact.abs() * 2**-11 + 2**-25 + COMPUTE
    else:
        assert (exact[:, :-1] - exact[:, 1:]).max() < 255 / 16  # else the other bound holds
        bound = torch.full_like(exact, 1 / 32 + COMPUTE)
    assert ((stored - exact).abs() <= bound).all()


def assert_targets_are(logprobs: Tensor, labels: Tensor, targets: TargetRows, encoding: str) -> None:
    """`logprobs` [target, vocab] are the teacher's, at the positions before the `labels`."""
    found = SparseTargets.from_numpy(targets)
    assert_within_encoding(found.logprobs, logprobs.gather(-1, found.ids), encoding)
    tail = logprobs.scatter(-1, found.ids, -torch.inf)
    assert (logprobs.gather(-1, found.ids).min(-1).values >= tail.max(-1).values - COMPUTE).all()
    expected = torch.stack([(tail / t).logsumexp(-1) for t in found.temperatures], -1)
    torch.testing.assert_close(found.tail_logsumexp, expected, rtol=0, atol=1e-3)
    label_logprob = torch.tensor(targets.label_logprob)
    torch.testing.assert_close(label_logprob, logprobs.gather(-1, labels[:, None])[:, 0], rtol=0, atol=COMPUTE)
    if found.tail_ids is not None and found.tail_logprobs is not None:
        assert_within_encoding(found.tail_logprobs, tail.gather(-1, found.tail_ids), "f16")


def assert_cache_says_what_the_teacher_does(
    model: Any, sequences: Iterable[CachedSequence], examples: Examples, encoding: str
) -> None:
    """Position, label, mask and values of every sequence."""
    for sequence, example in zip(sequences, examples, strict=True):
        np.testing.assert_array_equal(sequence.token_ids, example.token_ids)
        np.testing.assert_array_equal(sequence.target_mask, example.target_mask)
        columns = np.flatnonzero(example.target_mask)
        labels = torch.from_numpy(example.token_ids[columns + 1].astype(np.int64))
        logprobs = plain_logprobs(model, example.token_ids)[torch.from_numpy(columns)]
        assert_targets_are(logprobs, labels, sequence.targets, encoding)


def shifted(rows: TargetRows) -> TargetRows:
    return dataclasses.replace(rows, **{name: np.roll(values, 1, 0) for name, values in rows.arrays().items()})


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, conversations: list[Row]) -> Path:
    """A JSON Lines file of conversations."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in conversations[:120]))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved teacher."""
    return save(llama(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def many(conversations: list[Row]) -> Examples:
    """Enough for several of the smallest shards."""
    return tokenised(conversations[:120])


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, teacher: Teacher, many: Examples
) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("undisturbed")
    capture(teacher, many, root, **SMALL)
    assert len(list((root / "commits").iterdir())) >= 4
    return root, files_of(root)


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_the_cache_equals_the_teacher_at_every_target(
    folder: Path, chats: Path, tmp_path: Path, encoding: str, conversations: list[Row]
) -> None:
    settings = {"limit": 21, "max_length": 128, "max_prompt_length": 64, "encoding": encoding}
    summary = capture(str(folder), str(chats), tmp_path / "cache", **(SMALL | settings), device="cpu")
    cache, model = open_cache(tmp_path / "cache"), AutoModelForCausalLM.from_pretrained(folder)
    examples = tokenised(conversations[:21])
    assert summary.data_report.num_responses_cut > 5
    starts = [int((np.diff(example.target_mask.astype(int)) == 1).sum()) for example in examples]
    assert max(starts) == 2  # both turns of a conversation are supervised
    assert_cache_says_what_the_teacher_does(model, cache, examples, encoding)
    assert cache.num_tokens.max() == 128


def test_a_cache_shifted_by_one_does_not_pass_for_the_teachers(
    teacher: Teacher, cache: Cache, examples: Examples
) -> None:
    moved = [dataclasses.replace(sequence, targets=shifted(sequence.targets)) for sequence in cache]
    with pytest.raises(AssertionError):
        assert_cache_says_what_the_teacher_does(teacher.model, moved, examples, "f16")
    masked = [dataclasses.replace(sequence, target_mask=np.roll(sequence.target_mask, 1)) for sequence in cache]
    with pytest.raises(AssertionError):
        assert_cache_says_what_the_teacher_does(teacher.model, masked, examples, "f16")
    swapped = [dataclasses.replace(cache[0], targets=shifted(cache[0].targets)), *list(cache)[1:]]
    with pytest.raises(AssertionError):
        assert_cache_says_what_the_teacher_does(teacher.model, swapped, examples, "f16")


@pytest.mark.parametrize("collator", [Collator(), Collator(one_row=True), Collator(pack=False)])
def test_a_packed_batch_has_the_teachers_targets(teacher: Teacher, cache: Cache, collator: Collator) -> None:
    batch = collator([cache[index] for index in (3, 0, 7, 5, 2, 1)])
    logprobs, labels = packed_logprobs(teacher.model, batch)
    torch.testing.assert_close(batch["labels"], labels)
    assert_targets_are(logprobs, labels, rows_of(batch, cache), "f16")
    with pytest.raises(AssertionError):
        assert_targets_are(logprobs, labels, shifted(rows_of(batch, cache)), "f16")


def packed_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cut rows where positions restart, run every piece alone; return log-probs and labels at the targets."""
    table, following = [], []
    for tokens, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            table.append(plain_logprobs(model, tokens[start:stop].numpy()))
            following.append(tokens[start:stop].roll(-1))
    at = batch["target_positions"]
    return torch.cat(table)[at], torch.cat(following)[at]


def rows_of(batch: dict[str, Tensor], cache: Cache) -> TargetRows:
    names = ("ids", "logprobs", "tail_logsumexp", "label_logprob", "tail_ids", "tail_logprobs")
    arrays = {name: batch[name].numpy() for name in names}
    return TargetRows(**arrays, temperatures=cache.manifest.settings.temperatures)


def test_a_teacher_of_another_kind_is_captured_alike(examples: Examples, tmp_path: Path) -> None:
    model = gpt2(seed=3)
    capture(as_teacher(model, tiny_tokenizer()), examples, tmp_path / "cache", **SMALL)
    assert_cache_says_what_the_teacher_does(model, open_cache(tmp_path / "cache"), examples, "f16")


def test_a_smaller_k_of_a_cache_is_a_cache_of_that_k(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    large, small = tmp_path / "16", tmp_path / "5"
    capture(teacher, examples, large, k=16, tail_samples=0, encoding="f16")
    capture(teacher, examples, small, k=5, tail_samples=0, encoding="f16")
    for wide, narrow in zip(open_cache(large), open_cache(small), strict=True):
        found, expected = SparseTargets.from_numpy(wide.targets).narrow(5), SparseTargets.from_numpy(narrow.targets)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.logprobs, expected.logprobs)
        torch.testing.assert_close(found.tail_logsumexp, expected.tail_logsumexp, rtol=0, atol=1e-3)


def test_the_same_capture_again_does_nothing(
    undisturbed: tuple[Path, dict[str, bytes]], teacher: Teacher, many: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, files = undisturbed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(type(teacher.model), "forward", never)
    summary = capture(teacher, many, root, **SMALL)
    assert (summary.num_captured_tokens, summary.num_sequences) == (0, len(many))
    assert files_of(root) == files


def test_a_capture_stopped_after_some_shards_and_run_again_gives_the_same_bytes(
    undisturbed: tuple[Path, dict[str, bytes]], teacher: Teacher, many: Examples, tmp_path: Path
) -> None:
    _, files = undisturbed
    stops = [3000, 8000, 12_000]
    captured: list[int] = []

    def stopping(at: CaptureProgress) -> None:
        captured.append(at.num_tokens)
        if stops and at.num_tokens > stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    while stops:
        with pytest.raises(KeyboardInterrupt):
            capture(teacher, many, tmp_path / "cache", progress=stopping, **SMALL)
        with pytest.raises(CacheIncompleteError):
            open_cache(tmp_path / "cache")
    summary = capture(teacher, many, tmp_path / "cache", progress=stopping, **SMALL)
    assert summary.num_captured_tokens < summary.num_tokens == captured[-1]
    assert files_of(tmp_path / "cache") == files


def test_a_teacher_that_breaks_leaves_the_shards_before_it_and_nothing_of_its_own(
    undisturbed: tuple[Path, dict[str, bytes]],
    teacher: Teacher,
    many: Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, files = undisturbed
    third = open_cache(root).sequences.to_pandas().query("shard == 2")["id"].iloc[1]
    genuine = todi_offline.targets.rows.teacher_targets

    def breaking(logits: Tensor, *args: Any) -> Any:
        if current == third:
            logits = logits.clone()
            logits[3, 7] = torch.nan
        return genuine(logits, *args)

    current = ""

    def alone(teacher: Teacher, members: list[Example], settings: Any) -> Any:
        nonlocal current
        rows = []
        for member in members:
            current = member.id
            rows += targets_of(teacher, [member], settings)
        return SimpleNamespace(read=lambda: rows)

    with monkeypatch.context() as patched:
        patched.setattr(todi_offline.targets.rows, "teacher_targets", breaking)
        patched.setattr(todi_offline.capturing.engines, "queue_targets", alone)
        with pytest.raises(TeacherOutputError, match=f"example '{third}' at position [0-9]+ hold NaN"):
            capture(teacher, many, tmp_path / "cache", **SMALL)
    found = files_of(tmp_path / "cache")
    assert [name for name in found if name.startswith("commits/")] == ["commits/000000.json", "commits/000001.json"]
    assert not [name for name in found if "/c/2" in name]
    capture(teacher, many, tmp_path / "cache", **SMALL)
    assert open_cache(tmp_path / "cache").sequences.num_rows == len(many)
    assert sorted(files_of(tmp_path / "cache")) == sorted(files)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 4}, "settings.k: 8 in the cache, 4 now"),
        ({"temperatures": [1.0]}, "temperatures"),
        ({"tail_seed": 1}, "tail_seed"),
    ],
)
def test_a_begun_cache_refuses_other_settings(
    undisturbed: tuple[Path, dict[str, bytes]], teacher: Teacher, many: Examples, changes: dict[str, Any], named: str
) -> None:
    root, files = undisturbed
    with pytest.raises(CacheMismatchError, match=named):
        capture(teacher, many, root, **(SMALL | changes))
    assert files_of(root) == files


def test_a_begun_cache_refuses_another_teacher(
    undisturbed: tuple[Path, dict[str, bytes]], teacher: Teacher, many: Examples
) -> None:
    root, files = undisturbed
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights: not the same"):
        capture(as_teacher(llama(seed=1), tiny_tokenizer()), many, root, **SMALL)
    assert files_of(root) == files


def test_the_bytes_of_a_cache_depend_on_no_folder(folder: Path, chats: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "another"):
        place = tmp_path / name
        teacher, data = shutil.copytree(folder, place / "teacher"), shutil.copy(chats, place)
        settings = SMALL | {"limit": 12, "max_length": 64, "max_prompt_length": 32, "device": "cpu"}
        capture(str(teacher), str(data), place / "cache", **settings)
        found.append(files_of(place / "cache"))
    assert found[0] == found[1]
    for name, content in found[0].items():
        for private in (tmp_path.name, str(tmp_path), tmp_path.parent.name):
            assert private.encode() not in content, name


def test_a_file_a_config_and_settings_by_name_are_the_same_capture(folder: Path, chats: Path, tmp_path: Path) -> None:
    file = tmp_path / "capture.toml"
    file.write_text(
        f'out = "{tmp_path / "a"}"\n[teacher]\nteacher = "{folder}"\ndevice = "cpu"\n'
        f'[data]\ndata = "{chats}"\nlimit = 5\n[cache]\nk = 4\nshard_tokens = 4096\n'
    )
    capture(config=file, max_length=64, max_prompt_length=32)
    lengths = {"limit": 5, "max_length": 64, "max_prompt_length": 32}
    capture(str(folder), str(chats), tmp_path / "b", k=4, shard_tokens=4096, device="cpu", **lengths)
    config = CaptureConfig(
        out=str(tmp_path / "c"),
        teacher=TeacherConfig(teacher=str(folder), device="cpu"),
        data=DataConfig(data="elsewhere", **lengths),
        cache=CacheSettings(k=4, shard_tokens=4096),
    )
    capture(data=str(chats), config=config)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_wrong_columns_are_refused_before_the_teacher_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(todi_offline.capturing.loading, "load_teacher", None)
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": "Because."}')
    with pytest.raises(DataError, match="has the columns question, answer; expected messages"):
        capture(str(folder), str(tmp_path / "rows.jsonl"), tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 1])
def test_more_ids_than_the_tokenizer_has_are_refused_before_the_teacher_is_loaded(
    k: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(todi_offline.capturing.loading, "load_teacher", None)
    with pytest.raises(TargetsError, match=f"k (is|=) {k}"):
        capture(str(folder), "stdlib", tmp_path / "out", **(SMALL | {"k": k, "tail_samples": 4}))
    assert not (tmp_path / "out").exists()


def test_a_setting_that_does_not_exist_is_refused(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'temprature'; did you mean 'temperatures'\?"):
        capture(teacher, examples, tmp_path / "cache", temprature=2.0)
    assert not (tmp_path / "cache").exists()
