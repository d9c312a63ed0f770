"""The batches of vLLM's model runners in, the spans that a step reads out: the private names of vLLM stand here.

vLLM has two model runners. V1 (`vllm.v1.worker.gpu_model_runner`) calls its method `_get_prompt_logprobs_dict` after
each step; V2 (`vllm.v1.worker.gpu.model_runner`) has an object `prompt_logprobs_worker`, which it tells of requests
that begin and end. Both hand over the hidden states of a step before anything is sampled from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from todi_offline.errors import ConfigError, EngineError
from todi_offline.teacher.in_vllm.messages import KEY
from todi_offline.teacher.in_vllm.steps import Span, StepTargets

TESTED_VERSIONS = ("0.32",)
"""Minor versions of vLLM whose private names were checked, on both model runners."""

_SHUTDOWN_SECONDS = 30.0


def require_tested(version: str, *, is_tried: bool) -> None:
    """Refuse a version of vLLM whose private names were not checked, unless the user wants to try that version.

    Raises:
        ConfigError: with the versions that were checked.
    """
    if minor_version(version) not in TESTED_VERSIONS and not is_tried:
        raise ConfigError(
            f"vLLM {version} was not tested with this release, which reads private names of vLLM "
            f"{', '.join(TESTED_VERSIONS)}; install vLLM {TESTED_VERSIONS[-1]}, or try this version with "
            "--engine-untested"
        )


def minor_version(version: str) -> str:
    """Return `0.32` of `0.32.1+cpu`."""
    return ".".join(version.split(".")[:2])


def install(runner: Any, make: Callable[[Callable[[Tensor], Tensor | None]], StepTargets]) -> StepTargets:
    """Have a model runner hand its steps to what `make` makes of the model's head; return that.

    Raises:
        EngineError: the runner is neither V1 nor V2.
    """
    steps = make(runner.model.compute_logits)
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        runner._get_prompt_logprobs_dict = V1Hook(runner, steps)
    elif getattr(runner, "prompt_logprobs_worker", None) is not None:
        runner.prompt_logprobs_worker = V2Hook(steps)
    elif not hasattr(runner, "prompt_logprobs_worker"):  # else an early stage of a pipeline, which has no logits
        raise EngineError(
            f"vLLM's model runner {type(runner).__module__} is unknown; install vLLM {TESTED_VERSIONS[-1]}"
        )
    return steps


def is_answering() -> bool:
    """Whether this worker is the one to which logits are gathered: the first of the last stage of a pipeline."""
    from vllm.distributed import get_pp_group, get_tp_group

    return bool(get_pp_group().is_last_rank and get_tp_group().rank_in_group == 0)


def run(llm: Any, prompts: Sequence[Any], params: Sequence[Any], is_read: Callable[[int], None]) -> None:
    """Have an engine read prompts; call `is_read` with the tokens of each that is read, and with 0 after every step."""
    llm.enqueue(prompts, params, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                is_read(len(output.prompt_token_ids))
        is_read(0)


def is_death(error: Exception) -> bool:
    """Whether an error of vLLM says that the engine has died."""
    return type(error).__name__ == "EngineDeadError"


def shut_down(llm: Any) -> None:
    """End an engine and its processes."""
    llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)


class V1Hook:
    """Stands in place of the method `_get_prompt_logprobs_dict` of a V1 runner."""

    def __init__(self, runner: Any, steps: StepTargets) -> None:
        """Take the runner, which knows its requests and where they lie in a batch."""
        self._runner, self._steps = runner, steps

    def __call__(self, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> dict[str, Any]:
        """Read a step; `num_scheduled_tokens` has the tokens of each request that were read in it."""
        runner, spans = self._runner, []
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            if (job := _job(self._steps, request_id, request.sampling_params)) is not None:
                row = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                spans.append(Span(job, row, int(request.num_computed_tokens), int(count)))
        self._steps.step(hidden_states, spans)
        self._steps.keep_only(runner.requests)
        return {}


class V2Hook:
    """Stands in place of the `prompt_logprobs_worker` of a V2 runner."""

    def __init__(self, steps: StepTargets) -> None:
        """Take what reads the steps."""
        self._steps = steps

    def add_request(self, request_id: str, _index: int, sampling_params: Any) -> None:
        """Begin a request."""
        _job(self._steps, request_id, sampling_params)

    def remove_request(self, request_id: str) -> None:
        """Forget a request that is finished, or that the runner will begin anew."""
        self._steps.end(request_id)

    def compute_prompt_logprobs(
        self, _compute_logits: Any, hidden_states: Tensor, input_batch: Any, *_: Any
    ) -> dict[str, Any]:
        """Read a step."""
        spans = [
            Span(
                job,
                int(input_batch.query_start_loc_np[index]),
                int(input_batch.num_computed_prefill_tokens_np[index]),
                int(input_batch.num_scheduled_tokens[index]),
            )
            for index, request_id in enumerate(input_batch.req_ids)
            if (job := self._steps.job(request_id)) is not None
        ]
        self._steps.step(hidden_states, spans)
        return {}

    def compute_prompt_token_id_logprobs(self, *_: Any) -> dict[str, torch.Tensor]:
        """Return nothing: no request asks for the log-probs of chosen ids."""
        return {}


def _job(steps: StepTargets, request_id: str, sampling_params: Any) -> Any:
    """Return the sequence of a request, begun where the request carries an example; None where it carries none."""
    message = ((sampling_params and sampling_params.extra_args) or {}).get(KEY)
    if message is not None:
        steps.begin(request_id, message)
    return steps.job(request_id)
