"""Student logits and teacher targets in, the training loss out.

divergences.py  every divergence, of log-probs
config.py       the settings of the objective
positions.py    which positions are distilled
schedule.py     the weight of KD over a run
entries.py      logits and sparse targets as the entries of a divergence: dense and sparse, one value a position
objective.py    cross-entropy and divergence as the one number that is trained on
fused.py        the same from hidden states and the head, without the logits of all positions
"""

from todi_offline.losses.config import DistillationConfig
from todi_offline.losses.divergences import DIVERGENCES
from todi_offline.losses.entries import dense_divergence, sparse_divergence
from todi_offline.losses.fused import fused_linear_distill
from todi_offline.losses.objective import distillation_loss

__all__ = [
    "DIVERGENCES",
    "DistillationConfig",
    "dense_divergence",
    "distillation_loss",
    "fused_linear_distill",
    "sparse_divergence",
]
