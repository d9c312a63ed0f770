"""Steps of an engine: chunks of a sequence give the targets of the whole sequence, and errors are kept."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_vllm import hidden_states
from support.made_examples import assert_same_targets, some_examples
from torch import Tensor

import todi_offline.teacher.in_vllm.steps
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.teacher.in_transformers import Teacher, targets_of
from todi_offline.teacher.in_vllm.messages import example_message, parse_rows
from todi_offline.teacher.in_vllm.steps import Span, StepTargets

SETTINGS = CacheSettings(k=8, tail_samples=4)
(EXAMPLE,) = some_examples(90)
EVERYTHING = 2**30


def begun(head: Callable[[Tensor], Tensor | None], vocab_size: int = 512, *, is_answering: bool = True) -> StepTargets:
    steps = StepTargets(head, SETTINGS, vocab_size, is_answering=is_answering)
    steps.begin("a", example_message(0, EXAMPLE))
    return steps


def read(steps: StepTargets, hidden: Tensor, *spans: tuple[int, int]) -> None:
    """Read spans of the sequence, each in a step of its own."""
    job = steps.job("a")
    assert job is not None
    for start, stop in spans:
        steps.step(hidden[start:stop], [Span(job, 0, start, stop - start)])


def errors(steps: StepTargets) -> list[Any]:
    return steps.take(EVERYTHING)["errors"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def hidden(teacher: Teacher) -> Tensor:
    return hidden_states(teacher, EXAMPLE)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 89)],
        [(0, 1), (1, 2), (2, 89)],
        [(0, 30), (30, 60), (60, 89)],
        [(0, 30), (30, 60), (0, 45), (45, 89)],
        [(0, 60), (40, 89)],
        [(0, 89), (0, 89)],
        [(0, 89), (40, 89)],
    ],
    ids=str,
)
def test_spans_give_the_targets_of_the_sequence_for_any_split_and_restart(
    teacher: Teacher, hidden: Tensor, spans: list[tuple[int, int]]
) -> None:
    steps = begun(teacher.model.lm_head)
    read(steps, hidden, *spans)
    taken = steps.take(EVERYTHING)
    ((number, message),) = taken["rows"]
    assert (number, taken["errors"], taken["num_left"]) == (0, [], 0)
    assert_same_targets(parse_rows(message, SETTINGS), targets_of(teacher, [EXAMPLE], SETTINGS)[0])


def test_a_sequence_is_handed_out_once_and_only_when_it_is_read_through(teacher: Teacher, hidden: Tensor) -> None:
    steps = begun(teacher.model.lm_head)
    last = int(np.flatnonzero(EXAMPLE.target_mask)[-1])
    read(steps, hidden, (0, last))
    assert steps.take(EVERYTHING)["rows"] == []
    read(steps, hidden, (last, 89))
    assert len(steps.take(EVERYTHING)["rows"]) == 1
    assert steps.take(EVERYTHING)["rows"] == []


def test_a_step_beyond_the_prompt_changes_nothing(teacher: Teacher, hidden: Tensor) -> None:
    steps = begun(teacher.model.lm_head)
    read(steps, hidden, (0, 89))
    job = steps.job("a")
    assert job is not None
    steps.step(hidden[:1], [Span(job, 0, 89, 1)])
    taken = steps.take(EVERYTHING)
    assert (len(taken["rows"]), taken["errors"]) == (1, [])


def test_targets_are_handed_out_in_messages_of_limited_size(teacher: Teacher, hidden: Tensor) -> None:
    steps = StepTargets(teacher.model.lm_head, SETTINGS, 512, is_answering=True)
    spans = []
    for number in range(3):
        steps.begin(str(number), example_message(number, EXAMPLE))
        job = steps.job(str(number))
        assert job is not None
        spans.append(Span(job, 89 * number, 0, 89))
    steps.step(torch.cat([hidden] * 3), spans)
    taken = [steps.take(1) for _ in range(3)]
    assert [len(one["rows"]) for one in taken] == [1, 1, 1]
    assert [one["num_left"] for one in taken] == [2, 1, 0]
    assert sorted(one["rows"][0][0] for one in taken) == [0, 1, 2]


def test_positions_that_are_left_out_are_an_error(teacher: Teacher, hidden: Tensor) -> None:
    steps = begun(teacher.model.lm_head)
    read(steps, hidden, (0, 16), (32, 89))
    (error,) = errors(steps)
    assert error["kind"] == "EngineError"
    assert "positions 16 to 31" in error["message"]


def test_logits_that_are_no_numbers_name_example_and_position(teacher: Teacher, hidden: Tensor) -> None:
    position = int(np.flatnonzero(EXAMPLE.target_mask)[17])
    broken = hidden.clone()
    broken[position] = torch.nan
    steps = begun(teacher.model.lm_head)
    read(steps, broken, (0, 40), (40, 89))
    (error,) = errors(steps)
    assert (error["kind"], error["row"]) == ("TeacherOutputError", 17 - int(EXAMPLE.target_mask[:40].sum()))
    assert f"example '0' at position {position} " in error["message"]


def test_other_errors_are_kept_with_their_type(hidden: Tensor) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError("in the head")

    steps = begun(fail)
    read(steps, hidden, (0, 89))
    assert errors(steps) == [{"kind": "ZeroDivisionError", "message": "ZeroDivisionError: in the head", "row": 0}]
    assert errors(steps) == []


def test_running_out_of_memory_names_the_settings_to_lower(hidden: Tensor) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory")

    steps = begun(fail)
    read(steps, hidden, (0, 89))
    (error,) = errors(steps)
    assert error["kind"] == "OutOfMemoryError"
    assert "gpu_memory_utilization" in error["message"]


@pytest.mark.parametrize(
    ("head", "text"),
    [
        pytest.param(lambda hidden: hidden @ torch.ones(32, 100), "knows 512 ids, but .* logits for 100", id="few"),
        pytest.param(lambda hidden: None, "no logits", id="none"),
    ],
)
def test_a_head_that_does_not_fit_the_tokenizer_is_an_error(head: Any, text: str, hidden: Tensor) -> None:
    steps = begun(head)
    read(steps, hidden, (0, 89))
    (error,) = errors(steps)
    assert error["kind"] == "EngineError"
    assert re.search(text, error["message"])


def test_ids_that_only_pad_the_embedding_are_left_out(teacher: Teacher, hidden: Tensor) -> None:
    def padded(hidden: Tensor) -> Tensor:
        logits = teacher.model.lm_head(hidden)
        return torch.cat([logits, torch.full((len(logits), 7), 100.0)], 1)

    found = []
    for head in (teacher.model.lm_head, padded):
        steps = begun(head)
        read(steps, hidden, (0, 89))
        found.append(parse_rows(steps.take(EVERYTHING)["rows"][0][1], SETTINGS))
    assert_same_targets(*found)


@pytest.mark.parametrize("is_broken", [False, True], ids=["whole", "with NaN"])
def test_every_worker_computes_the_same_logits_whether_or_not_one_meets_an_error(
    teacher: Teacher, hidden: Tensor, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """Logits are gathered: a worker that computes fewer than the others leaves these waiting for ever."""
    monkeypatch.setattr(todi_offline.teacher.in_vllm.steps, "chunk_rows", lambda _: 16)
    if is_broken:
        hidden = torch.full_like(hidden, torch.nan)
    computed: list[list[int]] = []
    for is_answering in (True, False):
        sizes: list[int] = []

        def head(piece: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(piece))
            return teacher.model.lm_head(piece)  # type: ignore[no-any-return]

        steps = begun(head, is_answering=is_answering)
        read(steps, hidden, (0, 20), (20, 89))
        computed.append(sizes)
        assert bool(errors(steps)) == (is_broken and is_answering)
    assert computed[0] == computed[1] == [16, 16, 16]


def test_a_message_that_is_damaged_is_an_error_and_no_sequence(teacher: Teacher) -> None:
    steps = StepTargets(teacher.model.lm_head, SETTINGS, 512, is_answering=True)
    steps.begin("a", example_message(0, EXAMPLE) | {"tokens": b"abc"})
    assert steps.job("a") is None
    assert len(errors(steps)) == 1


def test_a_request_that_has_ended_is_forgotten(teacher: Teacher) -> None:
    steps = begun(teacher.model.lm_head)
    steps.begin("b", example_message(1, dataclasses.replace(EXAMPLE, id="b")))
    steps.keep_only({"b": None})
    assert steps.job("a") is None
    steps.end("b")
    steps.end("b")
    assert steps.job("b") is None
