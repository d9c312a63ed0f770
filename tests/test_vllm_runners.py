"""Both model runners of vLLM, as fakes: their batches give the targets of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_vllm import FakeV1, FakeV2, Step
from support.made_examples import assert_same_targets, some_examples

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.errors import ConfigError, EngineError
from todi_offline.teacher.in_transformers import Teacher, targets_of
from todi_offline.teacher.in_vllm.messages import parse_rows
from todi_offline.teacher.in_vllm.runners import install, minor_version, require_tested
from todi_offline.teacher.in_vllm.steps import StepTargets

SETTINGS = CacheSettings(k=8, tail_samples=4)
EXAMPLES = dict(enumerate(some_examples(40, 9, 70)))

each_runner = pytest.mark.parametrize("kind", [FakeV1, FakeV2], ids=["V1", "V2"])


def installed(runner: Any) -> StepTargets:
    return install(runner, lambda head: StepTargets(head, SETTINGS, 512, is_answering=True))


def assert_all_targets(teacher: Teacher, steps: StepTargets) -> None:
    taken = steps.take(2**30)
    assert taken["errors"] == []
    found = {number: parse_rows(message, SETTINGS) for number, message in taken["rows"]}
    assert sorted(found) == [0, 1, 2]
    for number, example in EXAMPLES.items():
        assert_same_targets(found[number], targets_of(teacher, [example], SETTINGS)[0])


@each_runner
def test_a_step_of_several_whole_sequences_and_one_that_is_not_ours(teacher: Teacher, kind: Any) -> None:
    runner = kind(teacher, EXAMPLES)
    steps = installed(runner)
    runner.step([(2, 0, 69), (0, 0, 39), (1, 0, 8)])
    assert_all_targets(teacher, steps)


@each_runner
def test_chunks_of_sequences_that_begin_and_end_in_different_steps(teacher: Teacher, kind: Any) -> None:
    runner = kind(teacher, EXAMPLES)
    steps = installed(runner)
    plan: list[Step] = [[(0, 0, 20)], [(0, 20, 19), (2, 0, 1)], [(2, 1, 40), (1, 0, 8)], [(2, 41, 28)]]
    for step in plan:
        runner.step(step)
    assert_all_targets(teacher, steps)


@each_runner
def test_a_sequence_that_is_preempted_is_read_again_from_its_beginning(teacher: Teacher, kind: Any) -> None:
    runner = kind(teacher, EXAMPLES)
    steps = installed(runner)
    runner.step([(0, 0, 39), (2, 0, 30)])
    runner.preempt(2)
    runner.finish(0)
    runner.step([(1, 0, 8)])
    runner.step([(2, 0, 25)])
    runner.step([(2, 25, 44)])
    assert_all_targets(teacher, steps)


@each_runner
def test_requests_that_are_finished_are_forgotten(teacher: Teacher, kind: Any) -> None:
    runner = kind(teacher, EXAMPLES)
    steps = installed(runner)
    runner.step([(0, 0, 39), (1, 0, 8)])
    runner.finish(0)
    runner.step([(2, 0, 69)])
    assert steps.job("0") is None
    assert steps.job("1") is not None


@each_runner
def test_a_runner_may_be_given_other_settings_later(teacher: Teacher, kind: Any) -> None:
    runner = kind(teacher, EXAMPLES)
    first, second = installed(runner), installed(runner)
    runner.step([(0, 0, 39), (1, 0, 8), (2, 0, 69)])
    assert first.take(2**30)["rows"] == []
    assert_all_targets(teacher, second)


def test_an_early_stage_of_a_pipeline_needs_no_hook(teacher: Teacher) -> None:
    runner = FakeV2(teacher, EXAMPLES)
    runner.prompt_logprobs_worker = None
    installed(runner)
    assert runner.prompt_logprobs_worker is None


def test_an_unknown_runner_is_refused() -> None:
    with pytest.raises(EngineError, match="vLLM's model runner types is unknown; install vLLM"):
        installed(SimpleNamespace(model=SimpleNamespace(compute_logits=lambda hidden: hidden)))


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.0+cpu"])
def test_tested_versions_are_accepted(version: str) -> None:
    require_tested(version, is_tried=False)
    assert minor_version(version) == "0.32"


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "0.3.2"])
def test_other_versions_are_refused_unless_the_user_tries_them(version: str) -> None:
    with pytest.raises(ConfigError, match="--engine-untested"):
        require_tested(version, is_tried=False)
    require_tested(version, is_tried=True)
