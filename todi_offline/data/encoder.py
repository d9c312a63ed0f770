"""Text in, token ids out, so that pieces tokenised apart fit together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from todi_offline.data.examples import DataConfig
from todi_offline.data.templates import ChatTemplate
from todi_offline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer, and what has to be known of it to put sequences together."""

    tokenizer: "PreTrainedTokenizerBase"
    config: DataConfig
    eos: int
    closing: dict[int, str]
    """The special tokens that may end a turn, with their texts."""
    start: list[int]
    """What the tokenizer puts before a text: BOS, or nothing."""
    starts_with_space: bool
    """It reads a text as though a space stood before it, as SentencePiece does: wrong in the middle of a sequence."""
    chat: ChatTemplate | None = None
    """The template of the rows, where they are conversations."""


def make_encoder(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> Encoder:
    """Look at what a tokenizer does, once."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token, or eos_token in its "
            "tokenizer_config.json"
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
        starts_with_space=after_line[: len(line)] == line and after_line[len(line) :] != alone,
    )


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text as it stands."""
    return _plain_ids(encoder.tokenizer, text)


def first_ids(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text that begins a sequence: BOS is put before it unless the text has it already."""
    ids = ids_of(encoder, text)
    return ids if ids[: len(encoder.start)] == encoder.start else encoder.start + ids


def next_ids(encoder: Encoder, text: str) -> list[int]:
    """Return the ids of a text that goes on with a sequence."""
    if not encoder.starts_with_space:
        return ids_of(encoder, text)
    line, ids = ids_of(encoder, "\n"), ids_of(encoder, "\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else ids_of(encoder, text)


def ids_of_pieces(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts that follow each other from the beginning of a sequence, each by itself."""
    if encoder.starts_with_space:
        return [next_ids(encoder, text) if number else ids_of(encoder, text) for number, text in enumerate(texts)]
    ids: list[list[int]] = encoder.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ended(encoder: Encoder, ids: list[int]) -> list[int]:
    """Return the ids with EOS at their end."""
    return ids if ids[-1:] == [encoder.eos] else [*ids, encoder.eos]
