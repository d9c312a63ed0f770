"""A fake of vLLM over a model of transformers: model runners, and an engine that uses them."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from todi_offline.data import Example
from todi_offline.teacher.in_transformers import Teacher, TeacherConfig, load_teacher
from todi_offline.teacher.in_vllm.messages import KEY, example_message, parse_example

Step = Sequence[tuple[int, int, int]]
"""Of each sequence that a step reads: its number, the position of its first token, how many tokens."""


def sampling_params(number: int, example: Example) -> SimpleNamespace:
    return SimpleNamespace(extra_args={KEY: example_message(number, example)})


def hidden_states(teacher: Teacher, example: Example) -> Tensor:
    """Return what the head reads at each position of what an engine is sent: all tokens but the last."""
    ids = torch.from_numpy(example.token_ids[:-1].astype(np.int64))[None]
    with torch.no_grad():
        return teacher.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]


class FakeRunner:
    """What both runners share: a model, requests, and the hidden states of a step."""

    def __init__(self, teacher: Teacher, examples: Mapping[int, Example]) -> None:
        self.model = SimpleNamespace(compute_logits=teacher.model.lm_head)
        self._hidden = {number: hidden_states(teacher, example) for number, example in examples.items()}
        self._params: dict[str, Any] = {
            str(number): sampling_params(number, example) for number, example in examples.items()
        }
        self._params["other"] = SimpleNamespace(extra_args=None)
        self._hidden_of_other = torch.zeros(3, teacher.model.config.hidden_size)

    def _read(self, step: Step) -> tuple[list[str], list[int], Tensor]:
        """Return the ids of the step's requests, where each begins, and the hidden states with rows of padding."""
        ids = [*(str(number) for number, _, _ in step), "other"]
        parts = [self._hidden[number][start : start + count] for number, start, count in step]
        parts += [self._hidden_of_other, torch.full_like(self._hidden_of_other[:2], torch.nan)]
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        return ids, starts, torch.cat(parts)


class FakeV1(FakeRunner):
    """As `vllm.v1.worker.gpu_model_runner`: a batch keeps its requests in an order of its own."""

    def __init__(self, teacher: Teacher, examples: Mapping[int, Example]) -> None:
        super().__init__(teacher, examples)
        self.requests: dict[str, Any] = {}
        self._get_prompt_logprobs_dict: Callable[[Tensor, Mapping[str, int]], dict[str, Any]] = lambda *_: {}

    def step(self, step: Step) -> None:
        ids, starts, hidden = self._read(step)
        begun = {str(number): start for number, start, _ in step} | {"other": 0}
        for name in ids:
            self.requests[name] = SimpleNamespace(
                sampling_params=self._params[name], num_computed_tokens=np.int64(begun[name])
            )
        self.input_batch = SimpleNamespace(req_id_to_index={name: index for index, name in enumerate(ids)})
        self.query_start_loc = SimpleNamespace(np=np.array(starts, np.int32))
        counts = {str(number): count for number, _, count in step} | {"other": len(self._hidden_of_other)}
        assert self._get_prompt_logprobs_dict(hidden, dict(reversed(counts.items()))) == {}

    def preempt(self, number: int) -> None:
        """Do nothing: a request that is preempted stays among the requests."""

    def finish(self, number: int) -> None:
        del self.requests[str(number)]


class FakeV2(FakeRunner):
    """As `vllm.v1.worker.gpu.model_runner`: it tells of requests that begin and end."""

    def __init__(self, teacher: Teacher, examples: Mapping[int, Example]) -> None:
        super().__init__(teacher, examples)
        self.prompt_logprobs_worker: Any = object()
        self._added: set[str] = set()

    def step(self, step: Step) -> None:
        ids, starts, hidden = self._read(step)
        for index, name in enumerate(ids):
            if name not in self._added:
                self.prompt_logprobs_worker.add_request(name, index, self._params[name])
                self._added.add(name)
        batch = SimpleNamespace(
            req_ids=ids,
            query_start_loc_np=np.array(starts, np.int32),
            num_computed_prefill_tokens_np=np.array([*(start for _, start, _ in step), 0], np.int32),
            num_scheduled_tokens=np.diff(starts)[: len(ids)].astype(np.int32),
        )
        worker = self.prompt_logprobs_worker
        assert worker.compute_prompt_logprobs(self.model.compute_logits, hidden, batch, None, None, None) == {}
        assert worker.compute_prompt_token_id_logprobs(self.model.compute_logits, hidden, batch, None) == {}

    def preempt(self, number: int) -> None:
        """Forget the request: it is added again where it is resumed."""
        self.finish(number)

    def finish(self, number: int) -> None:
        self.prompt_logprobs_worker.remove_request(str(number))
        self._added.discard(str(number))


CHUNK_TOKENS = 50
"""Tokens of a sequence that the fake engine reads in a step."""


class FakeLLM:
    """As `vllm.LLM`, with one worker that answers and one that does not; a step reads a chunk of two sequences."""

    log: list[str]
    """Arguments that vLLM was called with, and what became of it."""
    teacher: Teacher | None = None
    on_step: Callable[[], None] | None = None

    def __init__(self, model: str, worker_extension_cls: str, **options: Any) -> None:
        if model == "broken":
            raise RuntimeError("Engine core initialization failed.\nMore.")
        self.log.append(f"{sorted(options.items())}")
        self._teacher = self.teacher or load_teacher(TeacherConfig(teacher=model, device="cpu"))
        module, _, name = worker_extension_cls.rpartition(".")
        self._worker = getattr(importlib.import_module(module), name)()
        self._worker.model_runner = FakeV1(self._teacher, {})
        self._worker.model_config = SimpleNamespace(dtype=torch.float32)
        self.llm_engine, self.engine_core = self, self
        self._waiting: list[tuple[int, int, int]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        answer = getattr(self._worker, method)(*args)
        return [answer, None if method == "todi_take" else answer]

    def enqueue(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> None:
        assert not use_tqdm
        examples = dict(parse_example(one.extra_args[KEY]) for one in params)
        sent = [one.token_ids[:-1].tolist() for one in examples.values()]
        assert [one["prompt_token_ids"] for one in prompts] == sent
        old = self._worker.model_runner
        self._worker.model_runner = runner = FakeV1(self._teacher, examples)
        runner._get_prompt_logprobs_dict = old._get_prompt_logprobs_dict
        runner._get_prompt_logprobs_dict._runner = runner
        self._waiting = [(number, 0, len(one.token_ids) - 1) for number, one in examples.items()]

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[SimpleNamespace]:
        if self.on_step is not None:
            type(self).on_step()
        read, outputs = [], []
        for number, start, length in self._waiting[:2]:
            count = min(CHUNK_TOKENS, length - start)
            read.append((number, start, count))
            is_finished = start + count == length
            outputs.append(SimpleNamespace(finished=is_finished, prompt_token_ids=[0] * length))
        self._worker.model_runner.step(read)
        left = [(number, start + count) for number, start, count in read]
        ahead = [(*one, self._waiting[index][2]) for index, one in enumerate(left)]
        self._waiting = [one for one in ahead if one[1] < one[2]] + self._waiting[2:]
        return outputs

    def shutdown(self, timeout: float) -> None:
        self.log.append("shut down")
        assert timeout > 0


class EngineDeadError(Exception):
    """Named as that of vLLM."""


def install_fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str = "0.32.0", **attributes: Any) -> list[str]:
    """Put a fake in place of vLLM, with these attributes of `FakeLLM`; return its log."""
    log: list[str] = []
    vllm, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    vllm.__dict__.update(
        __version__=version,
        LLM=type("LLM", (FakeLLM,), {"log": log, **attributes}),
        SamplingParams=lambda **values: SimpleNamespace(**values),
    )
    first = SimpleNamespace(is_last_rank=True, rank_in_group=0)
    distributed.__dict__.update(get_pp_group=lambda: first, get_tp_group=lambda: first)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "set by the test")  # and what the client sets is forgotten after it
    return log
