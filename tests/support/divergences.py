"""Random logits, gradients, and every draw of a tail, for the tests of divergences."""

import numpy as np
import torch
from hypothesis import settings

from support import reference
from todi_offline.losses import DIVERGENCES
from todi_offline.targets.sparse import SparseTargets

seeded = settings(derandomize=True, deadline=None, max_examples=40)
OTHERS = ("adaptive_kl", "alpha_beta", "alpha_mixture", "concrete_score", "entropy_gate")
F_DIVERGENCES = [name for name in DIVERGENCES if name not in OTHERS]  # and ToDi, alike here
SMOOTH = [name for name in DIVERGENCES if name != "tvd"]
TEMPERATURES = (1.0, 2.0)


def random_logits(num_targets, vocab, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_targets, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


def probabilities(logits, temperature=1.0):
    return np.exp(reference.log_softmax(logits.detach().numpy(), temperature))


def every_draw(targets, logits):
    """Return one row for each id that could be drawn from the tail of a single row, and its probability."""
    kept, logprobs = targets.ids[0].tolist(), reference.log_softmax(logits[0].numpy())
    chance = reference.conditional_tail(logprobs, kept, targets.tail_temperature)
    drawn = torch.tensor(list(chance))[:, None]
    rows = torch.zeros(len(drawn), dtype=torch.int64)
    enumerated = SparseTargets(
        ids=targets.ids[rows],
        logprobs=targets.logprobs[rows],
        tail_logsumexp=targets.tail_logsumexp[rows],
        temperatures=targets.temperatures,
        tail_ids=drawn,
        tail_logprobs=torch.from_numpy(logprobs)[drawn],
        tail_temperature=targets.tail_temperature,
    )
    return enumerated, torch.tensor(list(chance.values()), dtype=torch.float64)
