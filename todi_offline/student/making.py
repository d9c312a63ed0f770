"""The name of a teacher in, a student cut from it or of its family, on the disk, out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from todi_offline.config import Setting, load_config
from todi_offline.data import DataConfig, load_examples
from todi_offline.errors import ConfigError
from todi_offline.models.loading import Model, Tokenizer, load_model, load_tokenizer
from todi_offline.student.config import MadeStudent, MakingConfig
from todi_offline.student.depth import prune_depth, spaced_layers
from todi_offline.student.fresh import fresh_student
from todi_offline.student.width import prune_width

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def make_student(
    source: str | None = None,
    out: str | Path | None = None,
    *,
    config: MakingConfig | Path | None = None,
    **settings: Setting,
) -> MadeStudent:
    """Make a student from a teacher, and save it in `out` with the teacher's tokenizer.

    `config` is a `MakingConfig` or its TOML file; settings passed by name override it. Layers are cut first, then
    heads, channels and neurons. With `fresh`, weights are random.

    Raises:
        TodiError: the settings contradict each other, the teacher cannot be loaded or cut so; see `prune_depth`,
            `prune_width` and `fresh_student`.
    """
    named: dict[str, Any] = {"source": source, "out": out}
    settings |= {name: value for name, value in named.items() if value is not None}
    resolved = load_config(MakingConfig, config, settings)
    if resolved.out.exists() and (not resolved.out.is_dir() or any(resolved.out.iterdir())):
        problem = "is not empty" if resolved.out.is_dir() else "is a file"
        raise ConfigError(f"{resolved.out} {problem}; choose another folder for the student")
    tokenizer = load_tokenizer(resolved.source)
    teacher = load_model(resolved.source, device="cpu")
    layers = _layers(teacher, resolved)
    student = _made(teacher, tokenizer, layers, resolved)
    student.save_pretrained(resolved.out)
    tokenizer.save_pretrained(resolved.out)
    return MadeStudent(
        layers=tuple(layers),
        sizes=_sizes(student),
        teacher_sizes=_sizes(teacher),
        num_parameters=student.num_parameters(),
        teacher_parameters=teacher.num_parameters(),
        fresh=resolved.fresh,
    )


def save_pruned(model: Model, tokenizer: Tokenizer, layers: Sequence[int], out: Path) -> None:
    """Save a student made of these layers of a model, with its tokenizer."""
    prune_depth(model, layers).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _sizes(model: Model) -> dict[str, int]:
    text = model.config.get_text_config(decoder=True)
    return {name: value for name in _SIZES if isinstance(value := getattr(text, name, None), int)}


def _layers(teacher: Model, config: MakingConfig) -> list[int]:
    num_layers = teacher.config.get_text_config(decoder=True).num_hidden_layers
    if config.layers is None:
        return list(config.keep) or list(range(num_layers))
    return spaced_layers(num_layers, min(config.layers, num_layers) if config.fresh else config.layers)


def _made(teacher: Model, tokenizer: Tokenizer, layers: list[int], config: MakingConfig) -> Model:
    if config.fresh:
        return fresh_student(teacher, config.widths, layers=config.layers, seed=config.seed)
    cut = prune_depth(teacher, layers) if config.keep or config.layers is not None else teacher
    return prune_width(cut, config.widths, _sequences(config, tokenizer)) if config.widths else cut


def _sequences(config: MakingConfig, tokenizer: Tokenizer) -> Iterator[Int[Tensor, " seq"]]:
    """Yield the examples by which importance is measured."""
    data = DataConfig(data=config.importance_data, limit=config.importance_rows, max_length=config.importance_length)
    for example in load_examples(data, tokenizer):
        yield torch.from_numpy(example.token_ids.astype(np.int64))
