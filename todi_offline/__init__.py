"""ToDi distillation of language models from an offline cache of sparse teacher logits.

Stage 1 runs the teacher once; stage 2 trains any number of students from what it wrote, without it.

    from todi_offline import capture, open_cache, train

    capture("teacher/", "instructions.jsonl", "cache/")
    train("student/", "cache/", "run/", max_steps=500)

The modules stand in the order in which data flows:

    data, stdlib_corpus    data set -> token ids and target masks
    models                 folder, hub id or GGUF file -> model and tokenizer
    teacher                examples -> logits at their supervised positions
    top_k, targets         logits -> sparse targets; target_rows, as a cache holds them
    cache                  sparse targets <-> Zarr shards
    capturing              stage 1: data set -> cache
    costing                what stage 1 and stage 2 will cost
    stream                 cache -> batches
    losses                 student logits and targets -> loss
    student, trainer       what is trained, and by what
    training               stage 2: cache -> student
    evaluation             a student -> its distance to a cached teacher, its ROUGE-L
    demo, cli              the whole of it, as commands

This file imports nothing until a name is used, so that it costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from todi_offline.cache.reader import Cache, open_cache
    from todi_offline.capturing import CaptureConfig, capture
    from todi_offline.evaluation import EvaluateConfig, evaluate
    from todi_offline.losses import DistillationConfig
    from todi_offline.targets import SparseTargets, sparsify
    from todi_offline.trainer import ToDiTrainer
    from todi_offline.training import TrainConfig, train

__version__ = "0.2.0"

__all__ = [
    "Cache",
    "CaptureConfig",
    "DistillationConfig",
    "EvaluateConfig",
    "SparseTargets",
    "ToDiTrainer",
    "TrainConfig",
    "capture",
    "evaluate",
    "open_cache",
    "sparsify",
    "train",
]

_HOMES = {
    "Cache": "cache.reader",
    "CaptureConfig": "capturing",
    "DistillationConfig": "losses",
    "EvaluateConfig": "evaluation",
    "SparseTargets": "targets",
    "ToDiTrainer": "trainer",
    "TrainConfig": "training",
    "capture": "capturing",
    "evaluate": "evaluation",
    "open_cache": "cache.reader",
    "sparsify": "targets",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
