"""The teacher's logits in, its top k entries, the mass of all others and samples of those out.

Probabilities are the teacher's own over the whole vocabulary given, in natural logs, never renormalised over
the top k. What is beyond the top k is the tail: its mass is kept exactly at each captured temperature, and
optionally a few ids drawn from it stand for its shape.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.cache.encoding import TargetRows
from todi_offline.errors import TargetsError, TeacherOutputError


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """A teacher's predictions at some positions: the top k ids, the mass of all others, samples of those.

    Attributes:
        ids: the k most probable ids, sorted by (log-prob descending, id ascending).
        logprobs: their log-probs at T = 1 over the whole vocabulary.
        tail_logsumexp: log sum of exp(logprob / T) over the ids not kept, a column for each temperature;
            -inf where they have no mass.
        temperatures: the temperatures captured.
        tail_ids: ids drawn with replacement from the tail at `tail_temperature`, or None.
        tail_logprobs: their log-probs at T = 1; -inf in a row whose tail has no mass.
        tail_temperature: the temperature that the samples were drawn at; one of `temperatures`.

    Raises:
        TargetsError: there are samples, but not the tail's mass at the temperature that they were drawn at.
    """

    ids: Int[Tensor, "target k"]
    logprobs: Float[Tensor, "target k"]
    tail_logsumexp: Float[Tensor, "target temperature"]
    temperatures: tuple[float, ...]
    tail_ids: Int[Tensor, "target sample"] | None = None
    tail_logprobs: Float[Tensor, "target sample"] | None = None
    tail_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check that the samples can be weighted."""
        if self.tail_ids is not None:
            self._column(self.tail_temperature)

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.ids)

    def __getitem__(self, index: slice | Tensor) -> "SparseTargets":
        """Return the targets that a slice, mask or tensor of indices selects."""
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseTargets":
        """Return the targets on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @classmethod
    def from_numpy(cls, rows: TargetRows) -> "SparseTargets":
        """Return rows of a cache as tensors: ids as int64, everything else as float32."""

        def floats(values: npt.NDArray[np.floating]) -> Tensor:
            return torch.from_numpy(values.astype(np.float32))

        def ids(values: npt.NDArray[np.unsignedinteger]) -> Tensor:
            return torch.from_numpy(values.astype(np.int64))

        return cls(
            ids=ids(rows.ids),
            logprobs=floats(rows.logprobs),
            tail_logsumexp=floats(rows.tail_logsumexp),
            temperatures=rows.temperatures,
            tail_ids=None if rows.tail_ids is None else ids(rows.tail_ids),
            tail_logprobs=None if rows.tail_logprobs is None else floats(rows.tail_logprobs),
            tail_temperature=rows.tail_temperature,
        )

    def narrow(self, k: int) -> "SparseTargets":
        """Return the first k columns, the dropped entries moved into the tail exactly, at every temperature.

        The stored samples are of the tail beyond the old k alone, so the narrowed targets have none.
        `todi_offline.losses.sparse_divergence` takes a smaller k itself and then makes use of them.

        Raises:
            TargetsError: k is not between 1 and the number of columns.
        """
        check_narrowing(k, self.ids.shape[1])
        dropped = [(self.logprobs[:, k:] / t).logsumexp(-1) for t in self.temperatures]
        return dataclasses.replace(
            self,
            ids=self.ids[:, :k],
            logprobs=self.logprobs[:, :k],
            tail_logsumexp=torch.logaddexp(self.tail_logsumexp, torch.stack(dropped, dim=-1)),
            tail_ids=None,
            tail_logprobs=None,
        )

    def tail_at(self, temperature: float) -> Float[Tensor, " target"]:
        """Return the tail's log sum of exp(logprob / temperature).

        Raises:
            TargetsError: the temperature was not captured.
        """
        return self.tail_logsumexp[:, self._column(temperature)]

    def log_partition(self, temperature: float) -> Float[Tensor, " target"]:
        """Return log sum of exp(logprob / temperature) over the whole vocabulary; about 0 at T = 1.

        Raises:
            TargetsError: the temperature was not captured.
        """
        return torch.logaddexp((self.logprobs / temperature).logsumexp(-1), self.tail_at(temperature))

    def proposal_logprobs(self) -> Float[Tensor, "target sample"]:
        """Return the log-probability with which each sample was drawn; 0 in a row whose tail has no mass.

        Raises:
            TargetsError: there are no samples.
        """
        if self.tail_logprobs is None:
            raise TargetsError("these targets hold no samples of the tail; capture some, or use tail='bucket'")
        drawn = self.tail_logprobs / self.tail_temperature - self.tail_at(self.tail_temperature)[:, None]
        return drawn.nan_to_num(nan=0.0)  # -inf minus -inf: no mass, nothing to draw

    def _column(self, temperature: float) -> int:
        if temperature in self.temperatures:
            return self.temperatures.index(temperature)
        raise TargetsError(
            f"no tail mass was captured at temperature {temperature:g}; these targets have "
            f"{_listed(self.temperatures)}; use one of those, or capture {temperature:g} too"
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SparseTargets":
        return dataclasses.replace(
            self,
            ids=change(self.ids),
            logprobs=change(self.logprobs),
            tail_logsumexp=change(self.tail_logsumexp),
            tail_ids=None if self.tail_ids is None else change(self.tail_ids),
            tail_logprobs=None if self.tail_logprobs is None else change(self.tail_logprobs),
        )


def sparsify(
    logits: Float[Tensor, "target vocab"],
    k: int,
    temperatures: Sequence[float] = (1.0, 2.0),
    num_tail_samples: int = 0,
    generator: torch.Generator | None = None,
    *,
    uniforms: Float[Tensor, "target sample"] | None = None,
    tail_temperature: float = 1.0,
) -> SparseTargets:
    """Return the top k of each row of logits, the tail's mass at each temperature and samples of the tail.

    The softmax runs over all columns in float32 (float64 logits stay so): cut padding ids off before.
    Among equal log-probs the smallest ids win, on every device. A logit of -inf is a probability of zero.
    `uniforms`, numbers in [0, 1), decide the samples in place of `num_tail_samples` and `generator`,
    so that a row's samples do not depend on the rows beside it.
    Beside the logits it needs about three float32 copies of them.

    Raises:
        TargetsError: k or a temperature is out of range; samples are asked of a tail that is empty.
        TeacherOutputError: a row holds NaN or +inf, or nothing but -inf; `row` says which.
    """
    if uniforms is None and num_tail_samples:
        device = generator.device if generator else "cpu"
        shape = (len(logits), num_tail_samples)
        uniforms = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    with torch.no_grad():
        return _sparsify_in_place(_logprobs(logits), k, tuple(temperatures), uniforms, tail_temperature)


def teacher_targets(
    logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    k: int,
    temperatures: Sequence[float] = (1.0, 2.0),
    uniforms: Float[Tensor, "target sample"] | None = None,
    tail_temperature: float = 1.0,
) -> tuple[SparseTargets, Float[Tensor, " target"]]:
    """Return what `sparsify` does and the log-probs of the labels, kept or not, from one softmax.

    Raises:
        TargetsError: as `sparsify`.
        TeacherOutputError: as `sparsify`.
    """
    with torch.no_grad():
        logprobs = _logprobs(logits)
        label_logprobs = logprobs.gather(-1, labels[:, None]).squeeze(-1)
        return _sparsify_in_place(logprobs, k, tuple(temperatures), uniforms, tail_temperature), label_logprobs


def check_narrowing(k: int, stored: int) -> None:
    """Raise TargetsError unless k of `stored` columns can be kept."""
    if not 1 <= k <= stored:
        raise TargetsError(f"k is {k}, but these targets hold the top {stored}; choose 1 to {stored}")


def _logprobs(logits: Float[Tensor, "target vocab"]) -> Float[Tensor, "target vocab"]:
    largest = logits.amax(-1)  # NaN where the row holds one
    broken = (~largest.isfinite()).nonzero().flatten().tolist()
    if broken:
        row = broken[0]
        found = {math.inf: "+inf", -math.inf: "nothing but -inf"}.get(largest[row].item(), "NaN")
        raise TeacherOutputError(
            f"row {row} of the teacher's logits holds {found}, so it has no softmax ({len(broken)} such of "
            f"{len(logits)} rows); a teacher in float16 may overflow: load it in bfloat16 or float32",
            row,
        )
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _sparsify_in_place(
    logprobs: Float[Tensor, "target vocab"],
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Float[Tensor, "target sample"] | None,
    tail_temperature: float,
) -> SparseTargets:
    """Turn log-probs into targets; the tensor given is overwritten, which saves a copy of it."""
    uniforms = None if uniforms is None or uniforms.shape[1] == 0 else uniforms
    _check(logprobs.shape[1], k, temperatures, tail_temperature if uniforms is not None else None)
    top_logprobs, ids = _top_k(logprobs, k)
    tail = logprobs.scatter_(-1, ids, -math.inf)
    masses = [(tail if t == 1 else tail / t).logsumexp(-1) for t in temperatures]
    tail_ids = None if uniforms is None else _draw(tail, uniforms, tail_temperature)
    return SparseTargets(
        ids=ids,
        logprobs=top_logprobs,
        tail_logsumexp=torch.stack(masses, dim=-1),
        temperatures=temperatures,
        tail_ids=tail_ids,
        tail_logprobs=None if tail_ids is None else tail.gather(-1, tail_ids),
        tail_temperature=tail_temperature,
    )


def _check(vocab: int, k: int, temperatures: tuple[float, ...], tail_temperature: float | None) -> None:
    if not 1 <= k <= vocab:
        raise TargetsError(f"k is {k}, but the vocabulary has {vocab} ids; choose 1 to {vocab}")
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise TargetsError(f"temperatures are {_listed(temperatures)}; expected one or more positive numbers")
    if len(set(temperatures)) < len(temperatures):
        raise TargetsError(f"temperatures are {_listed(temperatures)}; name each once")
    if tail_temperature is None:
        return
    if k == vocab:
        raise TargetsError(f"k = {k} keeps the whole vocabulary, so no tail is left; ask for no tail samples")
    if tail_temperature not in temperatures:
        raise TargetsError(
            f"tail_temperature is {tail_temperature:g}, not one of the temperatures {_listed(temperatures)}; "
            f"add it, for the tail's mass at it weights the samples"
        )


def _top_k(
    logprobs: Float[Tensor, "target vocab"], k: int
) -> tuple[Float[Tensor, "target k"], Int[Tensor, "target k"]]:
    """Return the k largest log-probs and their ids, sorted by (log-prob descending, id ascending).

    torch.topk promises nothing about equal values, and a bfloat16 head makes many. A stable sort restores
    the order among them; where the k-th and the next are equal, the choice among them is made anew.
    """
    values, ids = logprobs.topk(min(k + 1, logprobs.shape[1]))
    ambiguous = (values[:, k:] == values[:, k - 1 : k]).any(-1).nonzero().flatten()
    ids, order = ids[:, :k].sort(-1)
    values, order = values[:, :k].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if len(ambiguous):
        ids[ambiguous] = _smallest_tied_ids(logprobs[ambiguous], values[ambiguous], ids[ambiguous])
    return values, ids


def _smallest_tied_ids(
    logprobs: Float[Tensor, "row vocab"], values: Float[Tensor, "row k"], ids: Int[Tensor, "row k"]
) -> Int[Tensor, "row k"]:
    """Replace the ids whose log-prob is the k-th by the smallest ones that share it."""
    vocab, k = logprobs.shape[1], ids.shape[1]
    threshold = values[:, -1:]
    countdown = torch.arange(vocab, 0, -1, dtype=torch.int32, device=ids.device)
    tied_ids = vocab - torch.where(logprobs == threshold, countdown, 0).topk(k).values.long()
    num_above = (values > threshold).sum(-1, keepdim=True)
    rank_among_tied = torch.arange(k, device=ids.device) - num_above
    return torch.where(rank_among_tied < 0, ids, tied_ids.gather(-1, rank_among_tied.clamp(min=0)))


def _draw(
    tail: Float[Tensor, "target vocab"], uniforms: Float[Tensor, "target sample"], temperature: float
) -> Int[Tensor, "target sample"]:
    """Draw ids of the tail by inverting the cumulative sum, over ids, of exp(logprob / temperature)."""
    device = "cpu" if tail.device.type == "mps" else tail.device  # MPS has no float64
    cumulative = tail.to(device, torch.float64, copy=True)
    cumulative.sub_(cumulative.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min))
    cumulative.div_(temperature).exp_().cumsum_(-1)
    total = cumulative[:, -1:]
    # Below the total, so that the search ends at an id that adds to the sum: one of positive probability.
    points = torch.minimum(uniforms.to(cumulative) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, points, right=True)
    return drawn.clamp(max=tail.shape[1] - 1).to(tail.device)  # past the end only where the tail has no mass


def _listed(temperatures: tuple[float, ...]) -> str:
    return ", ".join(f"{t:g}" for t in temperatures) or "none"
