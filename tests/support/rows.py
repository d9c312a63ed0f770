"""Rows and tokenizers for the tests of the data, and the text of an example with its supervised parts marked."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.tiny import tiny_tokenizer
from todi_offline.data import (
    DataConfig,
    examples_from_rows,
)

PLAIN = tiny_tokenizer(chat=False)
CHAT = tiny_tokenizer(chat=True)

ROWS = [
    {"prompt": "What is 2 + 2?\n", "completion": "Four, of course."},
    {"prompt": "Sum up, in a word:\n", "completion": 'It is "good",\nreally.'},
    {"prompt": "Naïve café?\n", "completion": "Ça va — 東京."},
]

THREE_TURNS = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Nobody knows."},
    {"role": "user", "content": "And when?"},
    {"role": "assistant", "content": "Long ago."},
]


def encode(rows, tokenizer=PLAIN, **settings):
    rows = rows if isinstance(rows, list) else [rows]
    return examples_from_rows(rows, DataConfig(**settings), tokenizer)


def encode_one(row, tokenizer=PLAIN, **settings):
    (example,) = encode(row, tokenizer, **settings)
    return example


def marked(example, tokenizer):
    """Return the text of an example, with the supervised parts in brackets."""
    supervised = [False, *example.target_mask[:-1].tolist()]
    text, inside = "", False
    pieces: list[list[int]] = [[]]
    flags = []
    for token, flag in zip(example.token_ids.tolist(), supervised, strict=True):
        if flag != inside:
            flags.append(inside)
            pieces.append([])
            inside = flag
        pieces[-1].append(token)
    flags.append(inside)
    for piece, flag in zip(pieces, flags, strict=True):
        decoded = tokenizer.decode(piece)
        text += f"[{decoded}]" if flag else decoded
    return text


def with_bos(single="<|im_start|> $A <|endoftext|>"):
    """Return a tokenizer that puts BOS before a text and EOS after it."""
    tokenizer = tiny_tokenizer(chat=False)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def like_sentencepiece(scheme="always"):
    """Return a tokenizer that puts a space before every text, like Llama 2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({character for row in ROWS for text in row.values() for character in text})
    tokenizer.train_from_iterator(
        ["Four of course", "What is it in a word?"],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8-sig")
