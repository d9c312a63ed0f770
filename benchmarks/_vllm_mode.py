"""A teacher and arguments of vLLM in, one line of JSON out: how far its targets are from those of transformers.

Runs in a process of its own: vLLM reads its environment as it is imported, and changes torch.
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.capturing.config import EngineConfig
from todi_offline.capturing.engines import TransformersEngine
from todi_offline.capturing.vllm_engine import VllmEngine
from todi_offline.data import DataConfig, load_examples
from todi_offline.teacher.in_transformers import TeacherConfig, load_teacher

SETTINGS = CacheSettings(k=16, tail_samples=4)


def main(teacher_path: str, limit: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the targets of the first rows of the embedded data set, each read twice by vLLM."""
    config = TeacherConfig(teacher=teacher_path, device="cpu", dtype="float32")
    teacher = load_teacher(config)
    examples = list(load_examples(DataConfig(limit=limit, max_length=256), teacher.tokenizer))
    expected = TransformersEngine(teacher, 1024).targets(examples, SETTINGS, lambda _: None)
    started = time.perf_counter()
    served = TeacherConfig(teacher=teacher_path, dtype="float32")
    engine = VllmEngine.start(served, EngineConfig(engine="vllm", engine_set={"enforce_eager": True} | dict(options)))
    start_seconds = time.perf_counter() - started
    try:
        engine.targets(examples, SETTINGS, lambda _: None)  # so that a cache of prefixes holds all of them
        started = time.perf_counter()
        found = engine.targets(examples, SETTINGS, lambda _: None)
        seconds = time.perf_counter() - started
        metrics = {metric.name: getattr(metric, "value", None) for metric in _metrics(engine)}
    finally:
        engine.close()
    num_tokens = sum(len(example.token_ids) for example in examples)
    return {
        "vllm": engine.client.version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runner": engine.client.description["runner"],
        "num_preemptions": metrics.get("vllm:num_preemptions"),
        "start_seconds": start_seconds,
        "tokens_a_second": num_tokens / seconds,
        **compared(TargetRows.concatenate(found), TargetRows.concatenate(expected)),
    }


def compared(found: TargetRows, expected: TargetRows) -> dict[str, Any]:
    """Return how far two teachers' targets are apart."""
    same = found.ids == expected.ids
    assert found.tail_ids is not None
    assert expected.tail_ids is not None
    return {
        "num_targets": len(found),
        "ids": found.ids.size,
        "ids_same": int(same.sum()),
        "logprobs": float(np.abs(found.logprobs - expected.logprobs)[same].max()),
        "tails": float(np.abs(found.tail_logsumexp - expected.tail_logsumexp).max()),
        "labels": float(np.abs(found.label_logprob - expected.label_logprob).max()),
        "tail_ids": found.tail_ids.size,
        "tail_ids_same": int((found.tail_ids == expected.tail_ids).sum()),
    }


def _metrics(engine: VllmEngine) -> list[Any]:
    try:
        return list(engine.client._llm.get_metrics())
    except AssertionError:  # vLLM keeps none unless it is asked to
        return []


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))
