"""The teacher's logits in, its top k entries, the mass of all others and samples of those out.

Probabilities are the teacher's own over the whole vocabulary given, in natural logs, never renormalised over
the top k. What is beyond the top k is the tail: its mass is kept exactly at each captured temperature, and
optionally a few ids drawn from it stand for its shape.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline import tuning
from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import TargetsError, TeacherOutputError
from todi_offline.targets.top_k import top_k

_BLOCK = 256  # columns summed at once, of which those of a drawn block are looked at one by one


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """A teacher's predictions at some positions: the top k ids, the mass of all others, samples of those.

    Attributes:
        ids: the k most probable ids, sorted by (log-prob descending, id ascending); no columns if only
            samples are kept, drawn from the whole vocabulary (random sampling, Anshumann et al. 2025, arXiv
            2503.16870).
        logprobs: their log-probs at T = 1 over the whole vocabulary.
        tail_logsumexp: log sum of exp(logprob / T) over the ids not kept, a column for each temperature;
            -inf where they have no mass.
        temperatures: the temperatures captured.
        tail_ids: ids drawn from the tail at `tail_temperature`, or None. Each sample has the tail's distribution,
            so any few columns serve as well. A capture stratifies the samples of a row by id. An id may come twice.
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

        The narrowed targets have no samples, because the stored samples are of the tail beyond the old k. To use the
        samples with a smaller k, pass k to `todi_offline.losses.sparse_divergence`.

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
    It needs memory for about two float32 copies of the logits; on a CPU, of 8 MiB of the logits.

    Raises:
        TargetsError: k or a temperature is out of range; samples of an empty tail are requested.
        TeacherOutputError: a row holds NaN or +inf, or nothing but -inf; `row` says which.
    """
    if uniforms is None and num_tail_samples:
        device = generator.device if generator else "cpu"
        shape = (len(logits), num_tail_samples)
        uniforms = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    targets, _, largest = _targets(logits, k, tuple(temperatures), uniforms, tail_temperature)
    require_softmax(largest)
    return targets


def teacher_targets(
    logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    k: int,
    temperatures: Sequence[float] = (1.0, 2.0),
    uniforms: Float[Tensor, "target sample"] | None = None,
    tail_temperature: float = 1.0,
) -> tuple[SparseTargets, Float[Tensor, " target"], Float[Tensor, " target"]]:
    """Return what `sparsify` does, the log-probs of the labels, kept or not, and the largest logit of each row.

    The host reads nothing from the device, so that it does not wait there. Hence broken rows are not refused:
    `require_softmax` refuses them by their largest logits, once these are on the host.

    Raises:
        TargetsError: as `sparsify`.
    """
    targets, log_partition, largest = _targets(logits, k, tuple(temperatures), uniforms, tail_temperature)
    label_logprobs = logits.gather(-1, labels[:, None]) - log_partition
    return targets, label_logprobs.to(targets.logprobs.dtype).squeeze(-1), largest


def check_narrowing(k: int, stored: int) -> None:
    """Raise TargetsError unless k of `stored` columns can be kept."""
    if not 1 <= k <= stored:
        raise TargetsError(f"k is {k}, but these targets hold the top {stored}; choose 1 to {stored}")


@torch.no_grad()
def _targets(
    logits: Float[Tensor, "target vocab"],
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Float[Tensor, "target sample"] | None,
    tail_temperature: float,
) -> tuple[SparseTargets, Float[Tensor, "target 1"], Float[Tensor, " target"]]:
    """Return the targets, each row's log-partition in double precision, and its largest logit: NaN if the row has one.

    No softmax is taken: the kept logits and the sums over all others give the log-partition, so that a pass over the
    vocabulary is made once a temperature. The tail is counted from its own largest logit: it has a logarithm however
    far below the kept ones it lies.
    """
    uniforms = None if uniforms is None or uniforms.shape[1] == 0 else uniforms
    check_capture(logits.shape[1], k, temperatures, tail_temperature if uniforms is not None else None)
    values, ids, following = top_k(logits, k)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    largest = following.masked_fill(following == -math.inf, 0).to(dtype)
    summed = tuple(dict.fromkeys((*temperatures, 1.0)))
    parts = [
        _sum_and_draw(piece, summed, None if uniforms is None else uniforms[rows], tail_temperature)
        for rows, piece in _tails(logits, ids, largest)
    ]
    sums, tail_ids, tail_values = (torch.cat(part) for part in zip(*parts, strict=True))
    # Filled there: for a list that is copied to a device the host waits.
    scales = torch.stack([sums.new_full((), temperature) for temperature in summed])
    sums = _wide(largest) / scales + sums.log()
    rest = sums[:, summed.index(1.0), None]
    log_partition = torch.logaddexp(_wide(values).logsumexp(-1, keepdim=True), rest)
    shift = (log_partition - _wide(largest)).to(largest)
    targets = SparseTargets(
        ids=ids,
        logprobs=(_wide(values) - log_partition).to(largest),
        tail_logsumexp=(sums - log_partition / scales)[:, : len(temperatures)].to(largest),
        temperatures=temperatures,
        tail_ids=None if uniforms is None else tail_ids,
        tail_logprobs=None if uniforms is None else tail_values - shift,
        tail_temperature=tail_temperature,
    )
    return targets, log_partition.to(logits.device), (values if k else following)[:, 0]


def _tails(
    logits: Float[Tensor, "target vocab"], ids: Int[Tensor, "target k"], largest: Float[Tensor, "target 1"]
) -> Iterator[tuple[slice, Float[Tensor, "piece vocab"]]]:
    """Yield the logits less the largest of the tail, -inf at the kept ids, some rows at a time, in the same memory."""
    step = max(len(logits), 1)
    if logits.device.type == "cpu":
        step = min(step, max(1, tuning.CPU_COPY_BYTES // (largest.itemsize * logits.shape[1])))
    buffer = largest.new_empty(step, logits.shape[1])
    for start in range(0, max(len(logits), 1), step):  # once where there are no rows
        rows = slice(start, start + step)
        piece = torch.sub(logits[rows], largest[rows], out=buffer[: len(logits[rows])])
        yield rows, piece.scatter_(-1, ids[rows], -math.inf)


def _sum_and_draw(
    tail: Float[Tensor, "piece vocab"],
    temperatures: tuple[float, ...],
    uniforms: Float[Tensor, "piece sample"] | None,
    tail_temperature: float,
) -> tuple[Float[Tensor, "piece temperature"], Int[Tensor, "piece sample"], Float[Tensor, "piece sample"]]:
    """Return the sums of exp(tail / T), and the samples with their values; no columns of them without uniforms."""
    weights, sums, drawn = torch.empty_like(tail), [], tail.new_empty(len(tail), 0, dtype=torch.long)
    for temperature in temperatures:
        scaled = tail if temperature == 1 else torch.div(tail, temperature, out=weights)
        blocks = _block_sums(torch.exp(scaled, out=weights))
        sums.append(blocks.sum(-1, keepdim=True))
        if uniforms is not None and temperature == tail_temperature:
            drawn = _draw(weights, blocks, uniforms)
    return torch.cat(sums, dim=-1), drawn, tail.gather(-1, drawn)


def _wide(values: Tensor) -> Tensor:
    """Return in double precision, which MPS has not."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def require_softmax(largest: Float[Tensor, " target"]) -> None:
    """Refuse rows whose largest logit, which is NaN where the row holds one, is not finite; the host reads them.

    Raises:
        TeacherOutputError: `row` is the number of the first such row.
    """
    broken = (~largest.isfinite()).nonzero().flatten().tolist()
    if broken:
        row = broken[0]
        found = {math.inf: "+inf", -math.inf: "nothing but -inf"}.get(largest[row].item(), "NaN")
        raise TeacherOutputError(
            f"row {row} of the teacher's logits holds {found}, so it has no softmax ({len(broken)} such of "
            f"{len(largest)} rows); a teacher in float16 may overflow: load it in bfloat16 or float32",
            row,
        )


def check_capture(vocab: int, k: int, temperatures: tuple[float, ...], tail_temperature: float | None) -> None:
    """Raise TargetsError unless such targets can be taken of a vocabulary; no tail temperature means no samples."""
    least = 1 if tail_temperature is None else 0  # samples alone are targets too
    if not least <= k <= vocab:
        raise TargetsError(f"k is {k}, but the vocabulary has {vocab} ids; choose {least} to {vocab}")
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
            f"add it to the temperatures: the tail's mass there weights the samples"
        )


def _block_sums(weights: Float[Tensor, "target vocab"]) -> Float[Tensor, "target block"]:
    """Return the sums of consecutive columns, in double precision between blocks."""
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].view(len(weights), -1, _BLOCK).sum(-1) if whole else weights[:, :0]
    return _wide(torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1))


def _draw(
    weights: Float[Tensor, "target vocab"],
    blocks: Float[Tensor, "target block"],
    uniforms: Float[Tensor, "target sample"],
) -> Int[Tensor, "target sample"]:
    """Draw ids in proportion to weights by inverting their cumulative sum over ids: of a block's, then within it.

    In a row without weights any id is drawn.
    """
    block, rest = _invert(blocks.cumsum(-1), uniforms.to(blocks, non_blocking=True))
    columns = (block[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)).to(weights.device)
    beyond = columns >= weights.shape[1]
    chosen = weights.gather(-1, columns.masked_fill(beyond, 0).flatten(1)).view(columns.shape)
    column, _ = _invert(_wide(chosen.masked_fill(beyond, 0)).cumsum(-1), rest[:, :, None])
    drawn = block * _BLOCK + column.squeeze(-1)
    return drawn.clamp(max=weights.shape[1] - 1).to(weights.device)


def _invert(
    cumulative: Float[Tensor, "*rows column"], uniforms: Float[Tensor, "*rows sample"]
) -> tuple[Int[Tensor, "*rows sample"], Float[Tensor, "*rows sample"]]:
    """Return where a cumulative sum passes these shares of its total, and how far into that column, in [0, 1)."""
    total = cumulative[..., -1:]
    # Below the total, so that the search ends at a column that adds to the sum: one of positive weight.
    points = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, points, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(found > 0, cumulative.gather(-1, (found - 1).clamp(min=0)), 0)
    inside = (points - before) / (cumulative.gather(-1, found) - before)
    return found, inside.nan_to_num(nan=0.0).clamp(0, 1)


def _listed(temperatures: tuple[float, ...]) -> str:
    return ", ".join(f"{t:g}" for t in temperatures) or "none"
