"""Text comes in; token ids go out. Pieces that are tokenised apart still join into a correct sequence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from todi_offline.data.examples import DataConfig
from todi_offline.data.templates import ChatTemplate
from todi_offline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer, and the facts about it that joining pieces needs."""

    tokenizer: "PreTrainedTokenizerBase"
    config: DataConfig
    eos: int
    closing: dict[int, str]
    """The special tokens that may end a turn, with their texts."""
    start: list[int]
    """The ids that the tokenizer puts before a text: BOS, or none."""
    adds_space: bool
    """The tokenizer adds a space before a text, as SentencePiece does. This is wrong in the middle of a sequence."""
    chat: ChatTemplate | None = None
    """The chat template, if the rows are conversations."""


def make_encoder(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> Encoder:
    """Probe a tokenizer once.

    Raises:
        ModelError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, which must end each response; set tokenizer.eos_token, or eos_token in "
            "its tokenizer_config.json"
        )
    closing = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing.pop(tokenizer.unk_token_id, None)
    closing[tokenizer.eos_token_id] = tokenizer.eos_token
    alone, whole = _plain_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    line = _plain_ids(tokenizer, "\n")
    after_line = _plain_ids(tokenizer, "\na")
    return Encoder(
        tokenizer,
        config,
        eos=tokenizer.eos_token_id,
        closing=closing,
        start=next((whole[:n] for n in range(len(whole)) if whole[n : n + len(alone)] == alone), []),
        adds_space=after_line[: len(line)] == line and after_line[len(line) :] != alone,
    )


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    return _plain_ids(encoder.tokenizer, text)


def first_ids(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text that begins a sequence, with BOS in front unless the text already has it."""
    ids = ids_of(encoder, text)
    return ids if ids[: len(encoder.start)] == encoder.start else encoder.start + ids


def next_ids(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text that continues a sequence."""
    if not encoder.adds_space:
        return ids_of(encoder, text)
    line, ids = ids_of(encoder, "\n"), ids_of(encoder, "\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else ids_of(encoder, text)


def ids_of_pieces(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text of a list; together the texts make one sequence."""
    if encoder.adds_space:
        return [next_ids(encoder, text) if number else ids_of(encoder, text) for number, text in enumerate(texts)]
    ids: list[list[int]] = encoder.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def with_eos(encoder: Encoder, ids: list[int]) -> list[int]:
    """Return the ids, with EOS at the end."""
    return ids if ids[-1:] == [encoder.eos] else [*ids, encoder.eos]
