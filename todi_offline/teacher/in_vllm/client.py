"""Examples in, their targets out: the process that holds an engine of vLLM, whose workers compute them."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example
from todi_offline.errors import (
    ConfigError,
    EngineError,
    ModelError,
    OutOfMemoryError,
    TeacherOutputError,
    TodiError,
    first_line,
)
from todi_offline.targets.rows import sparsify_chunks
from todi_offline.teacher.in_vllm.messages import KEY, Message, example_message, parse_rows, settings_message
from todi_offline.teacher.in_vllm.processes import StartedProcesses
from todi_offline.teacher.in_vllm.runners import is_death, require_tested, run, shut_down
from todi_offline.teacher.in_vllm.watchdog import Watchdog, died
from todi_offline.teacher.in_vllm.worker import EXTENSION

_TAKEN_BYTES = 64 * 2**20  # of targets in one answer of a worker

_MESSAGE_CHARACTERS = 400

_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads may hang
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads as it is imported; a value that is set already stays."""


class Client:
    """An engine of vLLM, which may have processes of its own."""

    def __init__(
        self, model: str, options: Mapping[str, Any], *, vocab_size: int, patience_seconds: float, is_tried: bool
    ) -> None:
        """Start the engine; `options` are arguments of `vllm.LLM`, `vocab_size` the ids that the tokenizer knows.

        Raises:
            ConfigError: vLLM is missing, or of a version that was not tested and is not to be tried (`is_tried`).
            ModelError: vLLM cannot load the model.
            EngineError: vLLM does not answer.
        """
        vllm = _import_vllm()
        require_tested(vllm.__version__, is_tried=is_tried)
        self.version: str = vllm.__version__
        self._vocab_size, self._make_params = vocab_size, vllm.SamplingParams
        self._processes = StartedProcesses()
        self._watchdog = Watchdog("vLLM", patience_seconds, self._processes.has_one_ended)
        try:
            self._llm = self._watchdog.call(
                "load the teacher",
                lambda: vllm.LLM(model, worker_extension_cls=EXTENSION, **options),
            )
            self._processes.note()
            self.description: Message = self._ask("describe itself", "todi_describe", os.getpid())[0]
        except BaseException as error:  # an interrupt, too, leaves no process behind
            self._processes.note()
            self._processes.kill()
            if isinstance(error, TodiError) or not isinstance(error, Exception):
                raise
            raise ModelError(
                f"vLLM {self.version} cannot load {model}: {type(error).__name__}: {_on_one_line(error)}; its log is "
                "above"
            ) from error

    def targets(
        self, examples: Sequence[Example], settings: CacheSettings, report: Callable[[int], None]
    ) -> list[TargetRows]:
        """Return the targets of each example, in order; `report` is called with the tokens that were just read.

        Raises:
            TeacherOutputError: a logit is NaN or +inf; names the example and the position.
            EngineError: the engine has died, does not answer, or has left out an example.
        """
        self._ask("begin a shard", "todi_begin", settings_message(settings, self._vocab_size))
        asked = {number: example for number, example in enumerate(examples) if example.target_mask.any()}
        report(sum(len(example.token_ids) for example in examples if not example.target_mask.any()))
        prompts = [{"prompt_token_ids": example.token_ids[:-1].tolist()} for example in asked.values()]
        params = [self._params(number, example) for number, example in asked.items()]

        def is_read(num_prompt_tokens: int) -> None:
            if num_prompt_tokens:
                report(num_prompt_tokens + 1)
            self._watchdog.is_alive()

        self._call("read a shard", lambda: run(self._llm, prompts, params, is_read))
        rows = self._take()
        if missing := [example.id for number, example in asked.items() if number not in rows]:
            raise EngineError(f"vLLM returned no targets for {len(missing)} examples, the first of them {missing[0]!r}")
        nothing = self._no_rows(settings)
        return [parse_rows(rows[number], settings) if number in rows else nothing for number in range(len(examples))]

    def close(self) -> None:
        """End the engine and all its processes."""
        if not self._watchdog.is_stuck:
            with contextlib.suppress(Exception):
                self._processes.forget_ends()
                self._watchdog.call("shut down", lambda: shut_down(self._llm))
        self._processes.kill()
        self._watchdog.close()

    def _params(self, number: int, example: Example) -> Any:
        return self._make_params(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            skip_reading_prefix_cache=True,  # every position is to be read
            extra_args={KEY: example_message(number, example)},
        )

    def _no_rows(self, settings: CacheSettings) -> TargetRows:
        """Return the targets of an example without supervised positions."""
        labels, uniforms = torch.zeros(1, dtype=torch.int64), torch.zeros(1, settings.tail_samples)
        return sparsify_chunks([torch.zeros(1, self._vocab_size)], labels, uniforms, settings)[:0]

    def _take(self) -> dict[int, Message]:
        """Return what the workers have collected, by number of the example."""
        rows: dict[int, Message] = {}
        num_left = 1
        while num_left:
            answers = self._ask("hand over targets", "todi_take", _TAKEN_BYTES)
            if len(answers) != 1:
                raise EngineError(f"{len(answers)} workers of vLLM answered, expected one")
            for error in answers[0]["errors"]:
                raise _error_of(error)
            rows |= {number: message for number, message in answers[0]["rows"]}
            num_left = answers[0]["num_left"]
        return rows

    def _ask(self, task: str, method: str, *args: Any) -> list[Any]:
        """Call a method of all workers; return the answers of those that have one."""
        answers = self._call(task, lambda: self._llm.collective_rpc(method, args=args))
        return [answer for answer in answers if answer is not None]

    def _call(self, task: str, function: Callable[[], Any]) -> Any:
        try:
            return self._watchdog.call(task, function)
        except Exception as error:
            if is_death(error):
                raise EngineError(died("vLLM", task)) from error
            raise


def _error_of(sent: Message) -> TodiError:
    """Return the error that a worker has sent, as one of this process."""
    if sent["kind"] == TeacherOutputError.__name__:
        return TeacherOutputError(sent["message"], sent["row"])
    return (OutOfMemoryError if sent["kind"] == OutOfMemoryError.__name__ else EngineError)(sent["message"])


def _on_one_line(error: Exception) -> str:
    """Return the beginning of a message, of which the first line alone may say nothing."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


def _import_vllm() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"--engine vllm needs vLLM, which cannot be imported ({first_line(error)}): "
            "pip install 'todi-offline[vllm]'"
        ) from error
    return vllm
