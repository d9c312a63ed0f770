"""The private names of vLLM that the hooks use go out as JSON; runs in the environment of vLLM."""

import dataclasses
import inspect
import json

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1Runner

from todi_offline.teacher.in_vllm.runners import V1Hook, V2Hook


def num_parameters(function: object) -> int:
    """Return how many arguments a function takes by position, `self` left out; many for `*args`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]  # type: ignore[arg-type]
    return 100 if any(one.kind is one.VAR_POSITIONAL for one in parameters) else len(parameters)


methods = [name for name, value in vars(PromptLogprobsWorker).items() if callable(value) and name[0] != "_"]
print(
    json.dumps(
        {
            "fields": [field.name for field in dataclasses.fields(InputBatch)],
            "methods": {name: num_parameters(getattr(PromptLogprobsWorker, name)) for name in methods},
            "ours": {name: num_parameters(getattr(V2Hook, name, None)) for name in methods if hasattr(V2Hook, name)},
            "v1": num_parameters(V1Runner._get_prompt_logprobs_dict),
            "ours_v1": num_parameters(V1Hook.__call__),
            "v2_has_worker": "prompt_logprobs_worker" in inspect.getsource(V2Runner),
            "v2_is_told_apart": not hasattr(V2Runner, "_get_prompt_logprobs_dict"),
        }
    )
)
