"""The driver's side of vLLM, with a fake engine: targets, and every failure of an engine."""

import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_vllm import EngineDeadError, FakeLLM, install_fake_vllm
from support.made_examples import assert_same_targets, some_examples
from support.tiny import tiny_tokenizer
from support.tiny_models import llama

import todi_offline.teacher.in_vllm.client
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.errors import ConfigError, EngineError, ModelError, OutOfMemoryError, TeacherOutputError
from todi_offline.teacher.in_transformers import Teacher, as_teacher, targets_of
from todi_offline.teacher.in_vllm.client import Client

CLIENT = "todi_offline.teacher.in_vllm.client"
SETTINGS = CacheSettings(k=8, tail_samples=4)
EXAMPLES = some_examples(40, 9, 120, 2, 60)


def ignore(_: int) -> None:
    return None


def client(model: str = "", *, patience_seconds: float = 30.0, is_tried: bool = False, **options: Any) -> Client:
    return Client(model, options, vocab_size=512, patience_seconds=patience_seconds, is_tried=is_tried)


def test_targets_equal_those_of_transformers_in_order_and_every_token_is_reported(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_fake_vllm(monkeypatch, teacher=teacher)
    opened, reported = client(tensor_parallel_size=2), []
    assert (opened.version, opened.description["dtype"]) == ("0.32.0", "float32")
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, k=4, temperatures=(2.0,), tail_temperature=2.0)):
        reported.clear()
        found = opened.targets(EXAMPLES, settings, reported.append)
        for rows, expected in zip(found, targets_of(teacher, EXAMPLES, settings), strict=True):
            assert_same_targets(rows, expected)
        assert sum(reported) == sum(len(example.token_ids) for example in EXAMPLES)
    opened.close()
    assert log == ["[('tensor_parallel_size', 2)]", "shut down"]


def test_targets_are_taken_in_several_answers_where_they_are_many(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(monkeypatch, teacher=teacher)
    monkeypatch.setattr(todi_offline.teacher.in_vllm.client, "_TAKEN_BYTES", 1)
    opened = client()
    assert [len(rows) for rows in opened.targets(EXAMPLES, SETTINGS, ignore)] == [13, 3, 40, 0, 20]
    opened.close()


def test_logits_that_are_no_numbers_name_example_and_position_and_the_next_shard_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = as_teacher(llama(), tiny_tokenizer())
    bad = next(token for token in range(512) if sum(token in example.token_ids for example in EXAMPLES) == 1)
    (culprit,) = [example for example in EXAMPLES if bad in example.token_ids]
    with torch.no_grad():
        teacher.model.model.embed_tokens.weight[bad] = torch.nan
    install_fake_vllm(monkeypatch, teacher=teacher)
    opened = client()
    with pytest.raises(TeacherOutputError, match=f"example '{culprit.id}' at position"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    others = [example for example in EXAMPLES if example is not culprit]
    assert len(opened.targets(others, SETTINGS, ignore)) == len(others)
    opened.close()


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        pytest.param("CUDA out of memory", OutOfMemoryError, "gpu_memory_utilization", id="memory"),
        pytest.param("shapes differ", EngineError, "RuntimeError: shapes differ", id="other"),
    ],
)
def test_an_error_inside_a_worker_is_raised_here(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, raised: str, expected: type[Exception], text: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(raised)

    install_fake_vllm(monkeypatch, teacher=teacher)
    monkeypatch.setattr("todi_offline.teacher.in_vllm.steps.sparsify_chunks", fail)
    opened = client()
    with pytest.raises(expected, match=text):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()


def raising(error: Exception) -> Callable[[], None]:
    def step() -> None:
        raise error

    return step


def test_an_engine_that_has_died_says_to_run_the_command_again(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(monkeypatch, teacher=teacher, on_step=raising(EngineDeadError("dead")))
    opened = client()
    with pytest.raises(EngineError, match=r"died when asked to read a shard.*run the same command again"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()


def test_another_error_of_the_engine_is_left_as_it_is(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(monkeypatch, teacher=teacher, on_step=raising(ValueError("prompt too long")))
    opened = client()
    with pytest.raises(ValueError, match="prompt too long"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()


def test_an_engine_that_hangs_is_given_up_and_not_asked_to_shut_down(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    log = install_fake_vllm(monkeypatch, teacher=teacher, on_step=released.wait)
    opened = client()
    opened._watchdog._patience_seconds = 0.05
    with pytest.raises(EngineError, match="asked to read a shard and did not respond"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()
    released.set()
    assert "shut down" not in log


def test_examples_that_the_engine_leaves_out_are_named(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(monkeypatch, teacher=teacher, step=lambda self: self._waiting.clear() or [])
    opened = client()
    with pytest.raises(EngineError, match="no targets for 4 examples, the first of them '0'"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()


def test_two_workers_that_answer_are_refused(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(
        monkeypatch,
        teacher=teacher,
        collective_rpc=lambda self, method, args=(): FakeLLM.collective_rpc(self, method, args)[:1] * 2,
    )
    opened = client()
    with pytest.raises(EngineError, match="2 workers of vLLM answered"):
        opened.targets(EXAMPLES, SETTINGS, ignore)
    opened.close()


def test_a_model_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(monkeypatch)
    with pytest.raises(
        ModelError, match=r"cannot load broken: RuntimeError: Engine core initialization failed\. More\.;"
    ):
        client("broken")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_processes_that_were_started_are_ended_where_loading_ends_early(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    ended: list[str] = []
    install_fake_vllm(monkeypatch, collective_rpc=fail, teacher=teacher)
    for step in ("note", "kill"):
        monkeypatch.setattr(f"{CLIENT}.StartedProcesses.{step}", lambda _, step=step: ended.append(step))
    with pytest.raises(ModelError if isinstance(error, Exception) else KeyboardInterrupt):
        client()
    assert ended[-1] == "kill"


def test_a_version_that_was_not_tested_is_refused_unless_it_is_tried(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(monkeypatch, version="0.99.0", teacher=teacher)
    with pytest.raises(ConfigError, match=r"vLLM 0\.99\.0 was not tested"):
        client()
    client(is_tried=True).close()


def test_vllm_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'todi-offline\[vllm\]'"):
        client()
