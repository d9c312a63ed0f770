"""A model in, whether sequences may share a row of its batches out."""

import torch

from todi_offline.head import logits_difference
from todi_offline.models import Model, evaluation_mode


def packs_apart(model: Model) -> bool:
    """Whether sequences that share a row do not see each other in this model."""
    device = model.get_input_embeddings().weight.device
    first, second = torch.tensor([[1, 2, 3, 4, 5]], device=device), torch.tensor([[5, 4, 3]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    with evaluation_mode(model):
        together = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = model(input_ids=second, use_cache=False).logits
    return logits_difference(together[:, 5:], alone) is None
