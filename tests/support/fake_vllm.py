"""Model runners of vLLM as far as our hooks see them, on the hidden states of a model of transformers; no vLLM."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from todi_offline.data import Example
from todi_offline.teacher import Teacher
from todi_offline.vllm_teacher.messages import KEY, example_message

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

    def __init__(self, teacher: Teacher, examples: Sequence[Example]) -> None:
        self.model = SimpleNamespace(compute_logits=teacher.model.lm_head)
        self._hidden = [hidden_states(teacher, example) for example in examples]
        self._params: dict[str, Any] = {
            str(number): sampling_params(number, example) for number, example in enumerate(examples)
        }
        self._params["other"] = SimpleNamespace(extra_args=None)
        self._hidden_of_other = self._hidden[0][:3]

    def _read(self, step: Step) -> tuple[list[str], list[int], Tensor]:
        """Return the ids of the step's requests, where each begins, and the hidden states with rows of padding."""
        ids = [*(str(number) for number, _, _ in step), "other"]
        parts = [self._hidden[number][start : start + count] for number, start, count in step]
        parts += [self._hidden_of_other, torch.full((2, self._hidden[0].shape[1]), torch.nan)]
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        return ids, starts, torch.cat(parts)


class FakeV1(FakeRunner):
    """As `vllm.v1.worker.gpu_model_runner`: a batch keeps its requests in an order of its own."""

    def __init__(self, teacher: Teacher, examples: Sequence[Example]) -> None:
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

    def __init__(self, teacher: Teacher, examples: Sequence[Example]) -> None:
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
