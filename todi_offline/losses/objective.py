"""Student logits, labels and teacher targets in, the training loss and the sums to log out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.cache.format.rows import TargetRows
from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.divergences import forward_kl, reverse_kl
from todi_offline.losses.entries import Entries, as_tensors, entry_divergence, student_entries, teacher_entries
from todi_offline.losses.positions import parse_selection, position_weights, student_entropy
from todi_offline.targets.sparse import SparseTargets


def distillation_loss(
    student_logits: Float[Tensor, "target vocab"],
    labels: Int[Tensor, " target"],
    targets: SparseTargets | TargetRows,
    config: DistillationConfig | None = None,
    *,
    num_targets: Tensor | int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the sum over targets of (1 - w) CE + w KD, divided by `num_targets`, and sums to log; w is kd_weight.

    CE is at temperature 1, KD at the config's without a factor T^2, as in the code of the ToDi paper.
    `num_targets` is the number of targets over all ranks and accumulated micro-batches, so that the gradients
    of micro-batches add up to those of one batch; by default it is the number of the rows given.
    With kd_weight = 0 the loss is plain fine-tuning, and the divergence is computed for the log only.
    With `positions` KD is its mean over the selected rows times the number of rows; see `losses.positions`.

    The sums run over the targets and carry no gradient:

    - cross_entropy; kd; forward_kl and reverse_kl, at the config's temperature and with a bucket
    - teacher_kept_mass and student_kept_mass, of the k kept ids; tail_share, the teacher's mass off them
    - share_a_above_half, the share of entries that the teacher gives more than the student does: ToDi's gate
    - num_targets, the rows

    Raises:
        TargetsError: as `sparse_divergence`.
    """
    logits = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    config = config or DistillationConfig()
    targets = as_tensors(targets, logits.device)
    teacher = teacher_entries(targets, config.temperature)
    student, log_partition = student_entries(logits, targets, config.temperature)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.kd_weight != 0):
        kd = entry_divergence(teacher, student, config)
        if (selection := parse_selection(config.positions)) is not None:
            kd = kd * position_weights(selection, student_entropy(logits), reverse_kl_with_bucket(teacher, student))
        kd = kd.sum()
    if config.temperature != 1:
        log_partition = logits.logsumexp(-1)
    cross_entropy = (log_partition - logits.gather(-1, labels[:, None]).squeeze(-1)).sum()
    total = (1 - config.kd_weight) * cross_entropy + config.kd_weight * kd
    sums = {"cross_entropy": cross_entropy.detach(), "kd": kd.detach()} | sums_to_log(teacher, student, config.k)
    return total / (max(len(labels), 1) if num_targets is None else num_targets), sums


@torch.no_grad()
def reverse_kl_with_bucket(teacher: Entries, student: Entries) -> Float[Tensor, " target"]:
    """Return KL(q || p) of each position, the tail as one entry: how far the student is from the teacher."""
    return reverse_kl(teacher.with_bucket(), student.with_bucket())


@torch.no_grad()
def sums_to_log(teacher: Entries, student: Entries, k: int | None) -> dict[str, Tensor]:
    """Return the sums over targets that are logged, from the entries of both models."""
    k = teacher.kept.shape[1] if k is None else k
    teacher, student = teacher.narrow(k), student.narrow(k)
    p, q = teacher.with_bucket(), student.with_bucket()
    return {
        "forward_kl": forward_kl(p, q).sum(),
        "reverse_kl": reverse_kl(p, q).sum(),
        "teacher_kept_mass": teacher.kept.exp().sum(),
        "student_kept_mass": student.kept.exp().sum(),
        "tail_share": teacher.tail.exp().sum(),
        "share_a_above_half": (p > q).to(q.dtype).mean(-1).sum() if k else q.new_zeros(()),  # else rounding decides
        "num_targets": q.new_full((), len(q)),
    }
