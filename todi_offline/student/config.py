"""The settings of a student that is made from a teacher, and what came of them."""

from dataclasses import dataclass
from pathlib import Path

from todi_offline.errors import ConfigError
from todi_offline.student.width import Widths


@dataclass(frozen=True, kw_only=True, slots=True)
class MakingConfig:
    """The teacher that a student is made from, and the size of the student."""

    source: str
    """The teacher: a folder, a hub id, or a GGUF file."""
    out: Path
    """Folder for the student."""
    layers: int | None = None
    """Number of the teacher's layers to keep, evenly spaced."""
    keep: tuple[int, ...] = ()
    """The layers to keep, by number, in place of `layers`."""
    hidden: int | None = None
    """Channels of the hidden states. The most important ones are kept, the same in every layer."""
    heads: int | None = None
    """Heads of a layer. By default whole groups of heads that share keys are cut. With --kv-heads as in the teacher,
    each group loses its least important heads."""
    kv_heads: int | None = None
    """Heads of keys and values of a layer."""
    mlp: int | None = None
    """Neurons of the MLP of a layer."""
    importance_data: str = "stdlib"
    """Data that show how important each channel, head and neuron is; as in `todi capture --data`."""
    importance_rows: int = 32
    """Number of examples of this data to read, the first ones."""
    importance_length: int = 512
    """Cut each of these examples after this many tokens."""
    fresh: bool = False
    """Use random weights, but the teacher's embeddings: copied, or projected to fewer channels. Sizes that you leave
    out are scaled with --hidden."""
    seed: int = 42
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, or ask for nothing.

        Raises:
            ConfigError: they do.
        """
        if self.keep and self.layers is not None:
            raise ConfigError("both --layers and --keep are given; name only one of them")
        if self.keep and self.fresh:
            raise ConfigError("--keep names layers of the teacher, and --fresh keeps none; use --layers with --fresh")
        if not (self.keep or self.layers is not None or self.widths):
            raise ConfigError(
                "the student has no size; name a number of layers (--layers 8), the layers themselves (--keep "
                "0,4,8,29), or a width (--hidden, --heads, --kv-heads, --mlp)"
            )
        if self.importance_rows < 1:
            raise ConfigError(f"importance_rows is {self.importance_rows}; expected a number of examples above 0")

    @property
    def widths(self) -> Widths:
        """The widths that are asked for."""
        return Widths(hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads, mlp=self.mlp)


@dataclass(frozen=True, slots=True)
class MadeStudent:
    """What a student is made of."""

    layers: tuple[int, ...]
    """The teacher's layers that the student keeps; a fresh student has new layers of the same kinds."""
    sizes: dict[str, int]
    """Of its config, by their names there: `hidden_size`, `num_attention_heads`, ..."""
    teacher_sizes: dict[str, int]
    """The same of the teacher."""
    num_parameters: int
    teacher_parameters: int
    fresh: bool
