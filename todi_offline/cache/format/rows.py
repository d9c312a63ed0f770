"""Arrays of numbers in, teacher targets out: the rows that a capture makes, a cache stores and training reads."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from todi_offline.errors import TargetsError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Teacher targets of consecutive supervised positions; natural logs throughout.

    The fields are those of `todi_offline.targets.SparseTargets`, and the label's log-prob. Shapes and kinds of numbers
    are checked when rows are built; `check.invariants` looks at the numbers themselves.

    Raises:
        TargetsError: the arrays do not fit together.
    """

    ids: npt.NDArray[np.unsignedinteger]
    """[target, k], the most probable first."""
    logprobs: npt.NDArray[np.float32]
    """[target, k], at temperature 1 over the whole vocabulary."""
    tail_logsumexp: npt.NDArray[np.float32]
    """[target, temperature]: log of the sum of exp(logprob / T) over the ids that are not kept."""
    label_logprob: npt.NDArray[np.float32]
    """[target]: the teacher's log-prob of the token that follows."""
    temperatures: tuple[float, ...]
    tail_temperature: float = 1.0
    tail_ids: npt.NDArray[np.unsignedinteger] | None = None
    """[target, sample], drawn with replacement from the ids that are not kept."""
    tail_logprobs: npt.NDArray[np.float32] | None = None
    """[target, sample], at temperature 1 over the whole vocabulary."""
    log_partition: npt.NDArray[np.float32] | None = None
    """[target]: log of the sum of exp(logit), so that logit = logprob + log_partition; `bf16_logit` needs it."""

    def __post_init__(self) -> None:
        """Check that the arrays have the shapes and kinds that their fields promise."""
        num_targets, k = self.ids.shape if self.ids.ndim == 2 else (-1, -1)
        samples = -1 if self.tail_ids is None or self.tail_ids.ndim != 2 else self.tail_ids.shape[1]
        self._require("ids", "u", (num_targets, k))
        self._require("logprobs", "f", (num_targets, k))
        self._require("tail_logsumexp", "f", (num_targets, len(self.temperatures)))
        self._require("label_logprob", "f", (num_targets,))
        if self.tail_ids is not None or self.tail_logprobs is not None:
            self._require("tail_ids", "u", (num_targets, samples))
            self._require("tail_logprobs", "f", (num_targets, samples))
        if self.log_partition is not None:
            self._require("log_partition", "f", (num_targets,))

    def _require(self, name: str, kind: str, shape: tuple[int, ...]) -> None:
        values: Array | None = getattr(self, name)
        if values is None or values.dtype.kind != kind or values.shape != shape:
            got = "missing" if values is None else f"{values.dtype} of shape {list(values.shape)}"
            numbers = "unsigned integers" if kind == "u" else "floats"
            wanted = " x ".join("?" if size < 0 else str(size) for size in shape)
            raise TargetsError(f"{name} of these target rows is {got}; expected {numbers} of shape {wanted}")

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.ids)

    def __getitem__(self, index: slice) -> "TargetRows":
        """Return some of the targets."""
        cut: dict[str, Any] = {name: values[index] for name, values in self.arrays().items()}
        return dataclasses.replace(self, **cut)

    def arrays(self) -> dict[str, Array]:
        """Return the fields that are arrays, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    @staticmethod
    def concatenate(parts: Sequence["TargetRows"]) -> "TargetRows":
        """Return the targets of several, end to end; all have the same fields and settings."""
        names = parts[0].arrays()
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(parts[0], **joined)
