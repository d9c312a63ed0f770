"""The name of a teacher in, a student cut from it on the disk out."""

from collections.abc import Sequence
from pathlib import Path

from todi_offline.errors import ConfigError
from todi_offline.models import Model, Tokenizer, load_model, load_tokenizer
from todi_offline.student.depth import prune_depth, spaced_layers


def make_student(source: str, out: Path, *, layers: int | None = None, keep: Sequence[int] = ()) -> list[int]:
    """Cut a student from a teacher, save it with the teacher's tokenizer, and return the layers that it kept.

    Either `layers`, a number of evenly spaced ones, or `keep`, their numbers.
    """
    if bool(keep) == (layers is not None):
        raise ConfigError("name either a number of layers (--layers 8) or the layers themselves (--keep 0,4,8,29)")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder for the student")
    model = load_model(source, device="cpu")
    kept = list(keep) or spaced_layers(model.config.num_hidden_layers, layers or 0)
    save_pruned(model, load_tokenizer(source), kept, out)
    return kept


def save_pruned(model: Model, tokenizer: Tokenizer, layers: Sequence[int], out: Path) -> None:
    """Save a student made of these layers of a model, with its tokenizer."""
    prune_depth(model, layers).save_pretrained(out)
    tokenizer.save_pretrained(out)
