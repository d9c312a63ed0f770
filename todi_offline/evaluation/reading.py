"""A student and sequences of a cache come in; the student's predictions at their targets go out, for a page."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache
from todi_offline.losses.entries import student_entries
from todi_offline.models.head import head_of, require_vocabulary
from todi_offline.models.loading import Model, Tokenizer, evaluation_mode
from todi_offline.pages.tokens import TEACHER_ENTRIES, StudentRows
from todi_offline.targets.sparse import SparseTargets
from todi_offline.training.stream import Collator, batch_targets


def read_sequences(
    model: Model, tokenizer: Tokenizer, cache: Cache, sequences: Sequence[CachedSequence], temperature: float
) -> Iterator[StudentRows]:
    """Yield a student's predictions at the targets of each sequence, as log-probs at a temperature.

    Each sequence takes one forward pass.

    Raises:
        CacheMismatchError: the tokenizer differs from the cache's.
    """
    require_vocabulary(model, cache.manifest.vocab_size)
    require_same_tokenizer(tokenizer_fingerprint(tokenizer), cache.manifest, "the student")
    collate, device = Collator(pack=False), model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        for sequence in sequences:
            batch = {name: value.to(device) for name, value in collate([sequence]).items()}
            with head_of(model).at(batch["target_positions"]):
                logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :, : cache.manifest.vocab_size]
            yield predict(logits.float(), batch["labels"], batch_targets(batch, cache), temperature)


def predict(
    logits: Float[Tensor, "target vocab"], labels: Int[Tensor, " target"], targets: SparseTargets, temperature: float
) -> StudentRows:
    """Return a student's predictions at the ids of the targets, at the label, and at its own most probable ids."""
    entries, log_partition = student_entries(logits, targets, temperature)
    logprobs = logits / temperature - log_partition[:, None]
    at_one = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    own, own_ids = logprobs.topk(min(2 * TEACHER_ENTRIES, logprobs.shape[1]), dim=-1)
    predictions = {
        "kept": entries.kept,
        "tail": entries.tail,
        "label": logprobs.gather(-1, labels[:, None]).squeeze(-1),
        "nll": -at_one,
        "entropy": torch.special.entr(logprobs.exp()).sum(-1),
        "top": own,
    }
    return StudentRows(
        top_ids=own_ids.cpu().numpy(), **{name: value.double().cpu().numpy() for name, value in predictions.items()}
    )
