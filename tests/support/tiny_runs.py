"""Short training runs for the tests, and records of their batches."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import TrainingArguments

from support.tiny import tiny_tokenizer
from support.tiny_models import llama
from todi_offline.cache.reader import Cache
from todi_offline.losses import DistillationConfig
from todi_offline.training.trainer import ToDiTrainer

CHECKPOINTING = "activation_checkpointing"  # its old name: gradient_checkpointing
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}


class Noting(ToDiTrainer):
    """Records every micro-batch and its loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.batches.append(inputs)
            self.losses.append(loss.item())
        return loss


def trainer_of(
    out: Path,
    train_dataset: Cache | None,
    model: Any = None,
    *,
    distillation: DistillationConfig | None = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> Noting:
    values = QUIET | {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1} | settings
    return Noting(
        model=llama(seed=1) if model is None else model,
        args=TrainingArguments(output_dir=str(out), **values),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tiny_tokenizer(),
        distillation=distillation,
        callbacks=callbacks,
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    mine = weights(found)
    for name, value in weights(expected).items():
        assert (mine[name] - value).abs().max() <= tolerance, name


def seen_by(trainer: Noting, cache: Cache) -> list[set[int]]:
    """The sequences of each micro-batch, told by their tokens."""
    numbers = {sequence.token_ids.tobytes(): number for number, sequence in enumerate(cache)}
    assert len(numbers) == len(cache)
    found = []
    for batch in trainer.batches:
        members = set()
        for tokens, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
                piece = tokens[start:stop].numpy().astype(np.uint32)
                lengths = {len(key) // 4 for key in numbers}
                members |= {numbers[piece[:n].tobytes()] for n in lengths if piece[:n].tobytes() in numbers}
        found.append(members)
    return found
