"""What vLLM adds to the class of its workers: calls from the driver in, targets out."""

from typing import Any

from todi_offline.teacher.in_vllm.messages import Message, parse_settings
from todi_offline.teacher.in_vllm.processes import end_with
from todi_offline.teacher.in_vllm.runners import install, is_answering
from todi_offline.teacher.in_vllm.steps import StepTargets

EXTENSION = f"{__name__}.TargetsExtension"
"""The name by which vLLM loads the class below."""


class TargetsExtension:
    """Methods of a worker that the driver calls by name; no name may be one of the worker's own."""

    model_runner: Any
    model_config: Any
    _todi_steps: StepTargets

    def todi_describe(self, driver: int) -> Message:
        """Say for people what runs the model here, and end with the process whose id is `driver`."""
        end_with(driver)
        runner = type(self.model_runner).__module__
        return {"runner": runner, "dtype": str(self.model_config.dtype).removeprefix("torch.")}

    def todi_begin(self, settings: str) -> None:
        """Collect targets with these settings from now on, and forget what was collected; see `settings_message`."""
        parsed, vocab_size = parse_settings(settings)
        self._todi_steps = install(
            self.model_runner, lambda head: StepTargets(head, parsed, vocab_size, is_answering=is_answering())
        )

    def todi_take(self, max_bytes: int) -> Message | None:
        """Hand out targets, see `StepTargets.take`; None from a worker that does not answer."""
        return self._todi_steps.take(max_bytes) if self._todi_steps.is_answering else None
