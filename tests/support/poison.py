"""Teachers that fail at one example of a data set: a saved one, in whichever process loads it, and one in memory."""

import json
from pathlib import Path
from typing import Any, Literal

from support.tiny import tiny_tokenizer
from support.tiny_models import save_llama
from todi_offline.capturing.engines import Engine

SIGN = "☠☠"
"""A text that only this example contains."""

_CODE = """
import os, signal
from transformers import LlamaForCausalLM

SIGN = {sign}

class PoisonedForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, **inputs):
        for row in input_ids.tolist():
            if any(row[start : start + len(SIGN)] == SIGN for start in range(len(row))):
                {action}
        return super().forward(input_ids=input_ids, **inputs)
"""
_ACTIONS = {"raise": 'raise RuntimeError("no kernel for this")', "kill": "os.kill(os.getpid(), signal.SIGKILL)"}


def save_poisonous(
    folder: Path, rows: list[dict[str, Any]], number: int, how: Literal["raise", "kill"] | str
) -> tuple[Path, Path]:
    """Save a teacher that needs `trust_remote_code`, and conversations; row `number` kills the teacher."""
    teacher = save_llama(folder / "poisoned", num_hidden_layers=1)
    sign = tiny_tokenizer()(SIGN)["input_ids"]
    (teacher / "modeling_poisoned.py").write_text(_CODE.format(sign=sign, action=_ACTIONS[how]))
    config = json.loads((teacher / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_poisoned.PoisonedForCausalLM"}
    (teacher / "config.json").write_text(json.dumps(config))
    poisoned = json.loads(json.dumps(rows))
    poisoned[number]["messages"][-1]["content"] = f"{SIGN} Yes."
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in poisoned))
    return teacher, data


class Poisoned:
    """An engine that fails at an example, or ends its worker."""

    def __init__(self, engine: Engine, example_id: str, error: BaseException) -> None:
        self._engine, self._id, self._error = engine, example_id, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def targets(self, examples: Any, settings: Any, report: Any) -> Any:
        if any(example.id == self._id for example in examples):
            raise self._error
        return self._engine.targets(examples, settings, report)
