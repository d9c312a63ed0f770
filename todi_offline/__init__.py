"""ToDi distillation of language models from an offline cache of sparse teacher logits.

Stage 1 runs the teacher once; stage 2 trains any number of students from what it wrote, without it.

    from todi_offline import capture, open_cache, train

    capture("teacher/", "instructions.jsonl", "cache/")
    train("student/", "cache/", "run/", max_steps=500)

The modules stand in the order in which data flows:

    data          data set -> token ids and target masks
    models        folder, hub id or GGUF file -> model and tokenizer, and where its head runs
    targets       logits -> sparse targets
    teacher       examples -> targets at their supervised positions
    cache         sparse targets <-> Zarr shards
    capturing     stage 1: data set -> cache; costing, what it will cost
    losses        student logits and targets -> loss
    student       teacher -> a smaller model to train
    training      stage 2: cache -> batches -> a trained student
    evaluation    a student -> its distance to a cached teacher, its ROUGE-L
    pages         caches and runs -> pages
    commands      the whole of it, as `todi`

This file imports nothing until a name is used, so that it costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from todi_offline.cache.reader import Cache, open_cache
    from todi_offline.capturing import CaptureConfig, capture
    from todi_offline.evaluation import EvaluateConfig, evaluate
    from todi_offline.losses import DistillationConfig
    from todi_offline.targets.sparse import SparseTargets, sparsify
    from todi_offline.training.run import TrainConfig, train
    from todi_offline.training.trainer import ToDiTrainer

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
    "ToDiTrainer": "training.trainer",
    "TrainConfig": "training.run",
    "capture": "capturing",
    "evaluate": "evaluation",
    "open_cache": "cache.reader",
    "sparsify": "targets",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
