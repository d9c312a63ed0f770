"""Logits in, the k largest of each row and their ids out, in an order that no device changes."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.tuning import TOP_K_GROUP


def top_k(
    logits: Float[Tensor, "target vocab"], k: int
) -> tuple[Float[Tensor, "target k"], Int[Tensor, "target k"], Float[Tensor, "target 1"]]:
    """Return the k largest logits and their ids, sorted by (logit descending, id ascending), and the next one or -inf.

    torch.topk promises nothing about equal values, and a bfloat16 head makes many. A stable sort restores
    the order among them; where the k-th and the next are equal, the choice among them is made anew. On a CPU this is
    done in those rows alone. To learn which rows they are, the host would have to wait for another device, so there
    all rows are treated alike.
    """
    if logits.device.type != "cpu":
        return _top_k_without_reads(logits, k)
    values, ids = _largest(logits, min(k + 1, logits.shape[1]))
    following = values[:, k:] if values.shape[1] > k else torch.full_like(values[:, :1], -math.inf)
    ambiguous = (following == values[:, k - 1 : k]).any(-1).nonzero().flatten()
    ids, order = ids[:, :k].sort(-1)
    values, order = values[:, :k].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if len(ambiguous):
        ids[ambiguous] = _smallest_tied_ids(logits[ambiguous], values[ambiguous], ids[ambiguous])
    return values, ids, following


def _top_k_without_reads(
    logits: Float[Tensor, "target vocab"], k: int
) -> tuple[Float[Tensor, "target k"], Int[Tensor, "target k"], Float[Tensor, "target 1"]]:
    """Return what `top_k` does, by groups of neighbouring columns.

    Let the groups be sorted by (maximum descending, first id ascending). The first k + 1 of them hold the first k + 1
    logits by (logit descending, id ascending): each of them has one that comes before all logits of the groups behind.
    """
    vocab, count = logits.shape[1], min(k + 1, logits.shape[1])
    num_groups = vocab // TOP_K_GROUP
    if num_groups < 8 * count:
        values, ids = _first(logits, count)
    else:
        whole = num_groups * TOP_K_GROUP
        maxima = logits[:, :whole].view(len(logits), num_groups, TOP_K_GROUP).amax(-1)
        groups = _first(maxima, count)[1].sort(-1).values[:, :, None]
        members = (groups * TOP_K_GROUP + torch.arange(TOP_K_GROUP, device=logits.device)).flatten(1)
        others = torch.arange(whole, vocab, device=logits.device).expand(len(logits), -1)
        columns = torch.cat([members, others], dim=-1)  # ascending
        values, places = _first(logits.gather(-1, columns), count)
        ids = columns.gather(-1, places)
    following = values[:, k:] if count > k else torch.full_like(values[:, :1], -math.inf)
    return values[:, :k], ids[:, :k], following


def _first(
    values: Float[Tensor, "target column"], count: int
) -> tuple[Float[Tensor, "target count"], Int[Tensor, "target count"]]:
    """Return the first `count` values by (value descending, column ascending), and their columns."""
    found, columns = values.topk(count)
    columns, order = columns.sort(-1)
    found, order = found.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return found, _smallest_tied_ids(values, found, columns.gather(-1, order))


def _largest(
    logits: Float[Tensor, "target vocab"], count: int
) -> tuple[Float[Tensor, "target count"], Int[Tensor, "target count"]]:
    """Return the `count` largest logits and their ids, as topk does: among equal ones any.

    Of groups of columns those with the `count` largest maxima hold them: no other group has a larger one, and these
    have `count` already. So only the maxima and the columns of a few groups are sorted.
    """
    num_groups = logits.shape[1] // TOP_K_GROUP
    if num_groups < 8 * count:
        return logits.topk(count)
    whole = num_groups * TOP_K_GROUP
    maxima = logits[:, :whole].view(len(logits), TOP_K_GROUP, num_groups).amax(1)
    groups = maxima.topk(count, sorted=False).indices[:, :, None]
    members = (groups + torch.arange(0, whole, num_groups, device=logits.device)).flatten(1)
    others = torch.arange(whole, logits.shape[1], device=logits.device).expand(len(logits), -1)
    columns = torch.cat([members, others], dim=-1)
    values, places = logits.gather(-1, columns).topk(count)
    return values, columns.gather(-1, places)


def _smallest_tied_ids(
    logits: Float[Tensor, "row vocab"], values: Float[Tensor, "row k"], ids: Int[Tensor, "row k"]
) -> Int[Tensor, "row k"]:
    """Replace the ids whose logit is the k-th by the smallest ones that share it."""
    vocab, k = logits.shape[1], ids.shape[1]
    threshold = values[:, -1:]
    countdown = torch.arange(vocab, 0, -1, dtype=torch.int32, device=ids.device)
    tied_ids = vocab - torch.where(logits == threshold, countdown, 0).topk(k).values.long()
    num_above = (~(values <= threshold)).sum(-1, keepdim=True)  # with NaN, which topk takes for the largest
    rank_among_tied = torch.arange(k, device=ids.device) - num_above
    return torch.where(rank_among_tied < 0, ids, tied_ids.gather(-1, rank_among_tied.clamp(min=0)))
