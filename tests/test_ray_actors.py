"""Actors of a fake Ray: a capture survives their deaths with the same bytes, or names the shard that kills them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row, tokenised
from support.captures import SMALL, Sums, records_of, sums_in_bucket, sums_of
from support.fake_ray import Actor, Deadly, DiedError, FakeRay
from support.object_store import s3_bucket
from support.poison import Poisoned
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.capturing.in_process
import todi_offline.capturing.ray_actors
from todi_offline.cache.objects import noted_shards
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.capturing import CaptureProgress, capture
from todi_offline.capturing.engines import Engine, TransformersEngine
from todi_offline.capturing.notes import Notes
from todi_offline.data import Examples
from todi_offline.errors import CacheMismatchError, ConfigError, TodiError
from todi_offline.teacher.in_transformers import Teacher, as_teacher

BATCH_TOKENS = SMALL["batch_tokens"]


@pytest.fixture(scope="module")
def small_teacher() -> Teacher:
    return as_teacher(llama(num_hidden_layers=1), tiny_tokenizer())


@pytest.fixture(scope="module")
def many(conversations: list[Row]) -> Examples:
    return tokenised(conversations[:120])


@pytest.fixture(scope="module")
def whole_root(tmp_path_factory: pytest.TempPathFactory, small_teacher: Teacher, many: Examples) -> Path:
    """The cache that this process makes."""
    root = tmp_path_factory.mktemp("whole")
    capture(small_teacher, many, root, **SMALL)
    assert len(records_of(root)) >= 4
    return root


@pytest.fixture(scope="module")
def whole(whole_root: Path) -> Sums:
    return sums_of(whole_root)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, small_teacher: Teacher) -> Callable[..., FakeRay]:
    """Put a Ray of one process in the place of Ray, whose actors share one loaded teacher."""

    def put(seed: int = 0, deadly: Deadly = lambda _name, _actor: False, engine: Engine | None = None) -> FakeRay:
        ray = FakeRay(seed, deadly)
        loaded = engine or TransformersEngine(small_teacher, BATCH_TOKENS)
        monkeypatch.setattr(todi_offline.capturing.ray_actors, "_import_ray", lambda: ray)
        monkeypatch.setattr(todi_offline.capturing.ray_actors, "load_engine", lambda _: loaded)
        return ray

    return put


def in_actors(many: Examples, root: Path | str, num_actors: int = 2, **settings: Any) -> Any:
    return capture("a teacher", many, root, ray_actors=num_actors, **SMALL, **settings)


@pytest.mark.parametrize("num_actors", [1, 2, 5])
def test_actors_leave_the_bytes_of_a_single_process(
    fake: Callable[..., FakeRay], many: Examples, whole: Sums, tmp_path: Path, num_actors: int
) -> None:
    ray = fake(seed=num_actors)
    summary = in_actors(many, tmp_path / "cache", num_actors)
    assert sums_of(tmp_path / "cache") == whole
    assert len(ray.actors) == num_actors
    assert all(actor.is_dead for actor in ray.actors)
    assert sum(work.num_shards for work in summary.workers.values()) == len(records_of(tmp_path / "cache"))


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_actors_that_die_at_any_call_leave_the_same_bytes(
    fake: Callable[..., FakeRay], many: Examples, whole: Sums, tmp_path: Path, count: int
) -> None:
    num_deaths = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        ray = fake(seed, lambda name, _, rng=rng: "load" not in name and rng.random() < 0.1)
        in_actors(many, tmp_path / str(seed), ray_attempts=1000)
        assert sums_of(tmp_path / str(seed)) == whole, seed
        num_deaths += len(ray.actors) - 2
    assert num_deaths > count


def test_a_shard_that_a_dead_actor_has_committed_is_not_captured_again(
    fake: Callable[..., FakeRay], many: Examples, whole: Sums, tmp_path: Path
) -> None:
    died = []

    def deadly(name: str, actor: Actor) -> bool:
        if name == "after capture" and not died:
            died.append(actor.number)
            return True
        return False

    ray = fake(0, deadly)
    captured = []
    real = ray._step
    ray._step = lambda actor: (captured.append(actor.waiting[0].call[0]), real(actor))  # type: ignore[method-assign]
    in_actors(many, tmp_path / "cache", 1)
    assert died
    assert sums_of(tmp_path / "cache") == whole
    assert captured.count("capture") == len(records_of(tmp_path / "cache"))


@dataclass(frozen=True)
class Poison:
    """An example of shard 2 at which the teacher of all actors fails."""

    example: str
    kills: bool
    """Whether the example ends its actor; else the teacher raises an error."""


@pytest.fixture(params=["raises", "kills"])
def poison(
    request: pytest.FixtureRequest, fake: Callable[..., FakeRay], small_teacher: Teacher, whole_root: Path
) -> Poison:
    example = str(open_cache(whole_root).sequences.to_pandas().query("shard == 2")["id"].iloc[3])
    kills = request.param == "kills"
    error: BaseException = DiedError() if kills else RuntimeError("no kernel for this")
    fake(engine=Poisoned(TransformersEngine(small_teacher, BATCH_TOKENS), example, error))
    return Poison(example, kills)


def test_an_example_that_kills_its_teacher_is_named_and_committed_shards_stay(
    poison: Poison, many: Examples, small_teacher: Teacher, whole: Sums, tmp_path: Path
) -> None:
    with pytest.raises(TodiError) as caught:
        in_actors(many, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    example = f"example {poison.example!r} of shard 2 "
    assert str(caught.value).startswith(f"each worker that read {example}died" if poison.kills else example)
    assert "committed work is safe" in str(caught.value)
    kept = records_of(tmp_path / "cache")
    assert kept
    assert "000002.json" not in kept
    capture(small_teacher, many, tmp_path / "cache", **SMALL)  # goes on without actors
    assert sums_of(tmp_path / "cache") == whole


def test_actors_leave_an_example_out_that_their_teacher_does_not_survive(
    poison: Poison, many: Examples, tmp_path: Path
) -> None:
    summary = in_actors(many, tmp_path / "cache", skip_failed=True)
    reason = "each worker that read it died" if poison.kills else "RuntimeError: no kernel for this"
    assert summary.left_out == {poison.example: reason}
    cache = open_cache(tmp_path / "cache")
    assert poison.example not in cache.sequences["id"].to_pylist()
    assert len(cache) == len(many) - 1 == cache.manifest.parts[0].num_sequences
    in_actors(many, tmp_path / "alone", 1, skip_failed=True)
    assert sums_of(tmp_path / "alone") == sums_of(tmp_path / "cache")


@pytest.mark.parametrize("begins", ["actors", "one process"])
def test_a_capture_that_actors_begin_is_ended_by_one_process_and_the_other_way_round(
    fake: Callable[..., FakeRay], many: Examples, small_teacher: Teacher, whole: Sums, tmp_path: Path, begins: str
) -> None:
    fake()

    def stop(progress: CaptureProgress) -> None:
        if progress.num_shards == 2:
            raise KeyboardInterrupt

    kinds: list[Callable[..., Any]] = [in_actors, functools.partial(capture, small_teacher)]
    first, second = kinds if begins == "actors" else kinds[::-1]
    settings = {} if begins == "actors" else SMALL
    with pytest.raises(KeyboardInterrupt):
        first(many, tmp_path / "cache", progress=stop, **settings)
    assert 2 <= len(records_of(tmp_path / "cache")) < len(many)
    second(many, tmp_path / "cache", **(SMALL if begins == "actors" else {}))
    assert sums_of(tmp_path / "cache") == whole


def test_actors_go_on_where_a_process_has_died(
    fake: Callable[..., FakeRay],
    many: Examples,
    small_teacher: Teacher,
    whole_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the process has noted of a shard tells the actors which one to read example by example."""
    example = str(open_cache(whole_root).sequences.to_pandas().query("shard == 1")["id"].iloc[2])
    broken = Poisoned(TransformersEngine(small_teacher, BATCH_TOKENS), example, DiedError())
    with monkeypatch.context() as patch:
        patch.setattr(todi_offline.capturing.in_process, "load_engine", lambda *_: broken)
        patch.setattr(Notes, "stop", lambda _: None)  # nothing is taken back after a death
        with pytest.raises(DiedError):
            capture(small_teacher, many, tmp_path / "cache", **SMALL)
    assert noted_shards(LocalStore(tmp_path / "cache")) == [1]
    ray = fake()
    calls = []
    real = ray._step
    ray._step = lambda actor: (calls.append(actor.waiting[0].call[0]), real(actor))  # type: ignore[method-assign]
    in_actors(many, tmp_path / "cache")
    num_examples = int((open_cache(whole_root).columns["shard"] == 1).sum())
    assert calls.count("read") == num_examples
    assert sums_of(tmp_path / "cache") == sums_of(whole_root)


def test_actors_write_straight_to_an_object_store(fake: Callable[..., FakeRay], many: Examples, whole: Sums) -> None:
    fake()
    with s3_bucket():
        in_actors(many, "s3://bucket/cache")
        assert sums_in_bucket("s3://bucket/cache") == whole


def test_a_teacher_that_fails_at_everything_ends_the_capture(
    fake: Callable[..., FakeRay], many: Examples, small_teacher: Teacher, tmp_path: Path
) -> None:
    class Broken(Poisoned):
        def targets(self, *_: Any) -> Any:
            raise RuntimeError("no device")

    fake(engine=Broken(TransformersEngine(small_teacher, BATCH_TOKENS), "", RuntimeError()))
    with pytest.raises(
        TodiError, match=r"^the teacher fails at each of the \d+ examples of shard 0; .*: no device; committed"
    ):
        in_actors(many, tmp_path / "cache", 1, skip_failed=True)


def test_actors_that_die_while_they_load_are_not_blamed_on_a_shard(
    fake: Callable[..., FakeRay], many: Examples, tmp_path: Path
) -> None:
    fake(deadly=lambda name, _: name == "load")
    with pytest.raises(TodiError, match=r"^3 actors have died while they loaded the teacher: .* died unexpectedly\.; "):
        in_actors(many, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_actors_that_load_another_teacher_are_refused(
    fake: Callable[..., FakeRay],
    many: Examples,
    small_teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    other = as_teacher(llama(seed=1, num_hidden_layers=1), tiny_tokenizer())
    engines = iter([TransformersEngine(small_teacher, BATCH_TOKENS), TransformersEngine(other, BATCH_TOKENS)])
    monkeypatch.setattr(todi_offline.capturing.ray_actors, "load_engine", lambda _: next(engines))
    with pytest.raises(CacheMismatchError, match=r"^the actors differ: teacher\.weights"):
        in_actors(many, tmp_path / "cache")


def test_a_loaded_teacher_is_of_no_use_to_actors(small_teacher: Teacher, many: Examples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="actors of Ray load the teacher themselves; name it"):
        capture(small_teacher, many, tmp_path / "cache", ray_actors=2)


def test_progress_counts_the_tokens_of_all_actors(fake: Callable[..., FakeRay], many: Examples, tmp_path: Path) -> None:
    fake()
    seen = []
    in_actors(many, tmp_path / "cache", progress=seen.append)
    total = int(many.num_tokens.sum())
    assert (seen[0].num_tokens, seen[-1].num_tokens, seen[-1].total_tokens) == (0, total, total)
    assert seen[-1].num_shards == seen[-1].total_shards == len(records_of(tmp_path / "cache"))
