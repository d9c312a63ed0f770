"""A row comes in; by the form of its columns, tokens go out, each supervised or not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from todi_offline.data.conversations import encode_conversation, encode_exchange, read_conversation, read_messages
from todi_offline.data.encoder import Encoder, first_ids, next_ids, with_eos
from todi_offline.data.templates import choose_template
from todi_offline.data.tokens import Dropped, Row, Tokens, drop_if_blank, string_of
from todi_offline.errors import DataError

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

MASKS = ("assistant_masks", "completion_mask", "labels")
"""Columns that mark the supervised `input_ids`, under the names of trl and transformers; label -100 is unsupervised."""


@dataclass(frozen=True, slots=True)
class Form:
    """A set of columns, and how to encode a row with these columns."""

    name: str
    columns: tuple[str, ...]
    """The columns that a row needs."""
    encode: Callable[[Encoder, Row], Tokens]
    answer: str | None = None
    """The column of the answer, if there is one: a text, a list of references, or messages."""
    template: str | None = None
    """The template around a prompt: `chat`, `alpaca` or none."""


def recognise_form(first: Any, encoder: Encoder, source: str) -> Form:
    """Return the form that fits the columns of the first row.

    Raises:
        DataError: no form fits.
    """
    row = columns_of(first, f"row 0 of {source}")
    form = form_of(row)
    if form is None:
        raise DataError(
            f"{source} has the columns {', '.join(map(str, row))}; expected messages, or prompt and completion, or "
            "instruction (and input) and output or response, or input_ids, or text; rename the columns"
        )
    return replace(form, template=_template_of(form, row, encoder))


def form_of(row: Row) -> Form | None:
    """Return the first form whose columns the row has; None if no form fits."""
    return next((form for form in FORMS if row.keys() >= set(form.columns)), None)


def encoder_of(form: Form, encoder: Encoder) -> Encoder:
    """Return an encoder with a chat template, if rows of this form need one.

    Raises:
        ModelError: the form needs a chat template and the tokenizer has none.
    """
    if form.template != "chat":
        return encoder
    config = encoder.config
    specials = list(encoder.closing.values())
    chat = choose_template(encoder.tokenizer, specials, config.chat_template, config.chat_template_kwargs)
    return replace(encoder, chat=chat)


def columns_of(row: Any, where: str) -> Row:
    """Return a row that must be a mapping from columns to values."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected columns with their values")
    return row


def _template_of(form: Form, row: Row, encoder: Encoder) -> str | None:
    has_template = bool(encoder.tokenizer.chat_template or encoder.config.chat_template)
    if form.columns[0] == "messages" or (form.columns[0] == "prompt" and isinstance(row["prompt"], list)):
        return "chat"
    if form.columns[0] == "instruction" and "prompt" not in row:
        return "chat" if has_template else "alpaca"
    return None


def _encode_messages(encoder: Encoder, row: Row) -> Tokens:
    return encode_conversation(encoder, read_conversation(encoder, row, read_messages(row, "messages")))


def _encode_completion(encoder: Encoder, row: Row) -> Tokens:
    if not isinstance(row.get("prompt"), list):
        return _encode_pair(encoder, _text(row, "prompt"), _answer(row, "completion"))
    prompt, answer = read_messages(row, "prompt"), read_messages(row, "completion")
    return encode_exchange(encoder, read_conversation(encoder, row, prompt + answer), len(prompt))


def _encode_instruction(answer: str, encoder: Encoder, row: Row) -> Tokens:
    response = _answer(row, answer)
    if "prompt" in row:
        return _encode_pair(encoder, _text(row, "prompt"), response)
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else _text(row, "input")
    if encoder.chat is None:
        layout = ALPACA_WITH_INPUT if context else ALPACA
        return _encode_pair(encoder, layout.format(instruction=instruction, input=context), response)
    question = f"{instruction}\n\n{context}" if context else instruction
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return encode_exchange(encoder, read_conversation(encoder, row, turns), 1)


def _encode_pair(encoder: Encoder, prompt: str, response: str) -> Tokens:
    """Encode a prompt and its answer; a prompt that is too long loses its middle."""
    prompt_ids = first_ids(encoder, prompt)
    limit = encoder.config.prompt_limit
    cut = len(prompt_ids) > limit
    if cut:
        head = (limit + 1) // 2
        prompt_ids = prompt_ids[:head] + prompt_ids[len(prompt_ids) - (limit - head) :]
    response_ids = with_eos(encoder, next_ids(encoder, drop_if_blank(response)))
    return Tokens(prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids), prompt_cut=cut)


def _encode_text(encoder: Encoder, row: Row) -> Tokens:
    ids = with_eos(encoder, first_ids(encoder, drop_if_blank(_text(row, "text"))))
    return Tokens(ids, [True] * len(ids), splits=True)


def _encode_ids(encoder: Encoder, row: Row) -> Tokens:
    ids = _numbers(row, "input_ids")
    known = len(encoder.tokenizer)
    if wrong := [token for token in ids if not 0 <= token < known]:
        raise DataError(f"column 'input_ids' holds the id {wrong[0]}; the tokenizer knows 0 to {known - 1}")
    if not ids:
        raise Dropped("num_empty")
    supervised = [True] * len(ids)
    for column in MASKS:
        if row.get(column) is None:
            continue
        flags = _numbers(row, column)
        if len(flags) != len(ids):
            raise DataError(f"column {column!r} has {len(flags)} entries for {len(ids)} of 'input_ids'")
        if column == "labels" and any(flag not in (-100, token) for flag, token in zip(flags, ids, strict=True)):
            raise DataError("column 'labels' differs from 'input_ids'; expected the same ids, or -100")
        wanted = [flag != -100 for flag in flags] if column == "labels" else map(bool, flags)
        supervised = [one and other for one, other in zip(supervised, wanted, strict=True)]
    return Tokens(ids, supervised)


FORMS = (
    Form("input_ids", ("input_ids",), _encode_ids),
    Form("messages", ("messages",), _encode_messages, answer="messages"),
    Form("prompt + completion", ("prompt", "completion"), _encode_completion, answer="completion"),
    Form("instruction + output", ("instruction", "output"), partial(_encode_instruction, "output"), answer="output"),
    Form(
        "instruction + response",
        ("instruction", "response"),
        partial(_encode_instruction, "response"),
        answer="response",
    ),
    Form("text", ("text",), _encode_text),
)
"""All forms, in the order of preference. A new form is one more entry here."""


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise DataError(f"column {column!r} is missing, though the first row has it; add it, or drop such rows")
    return string_of(row[column], f"column {column!r}")


def _answer(row: Row, column: str) -> str:
    """Return the answer of a row: the first one if the column holds several references."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return string_of(value[0], f"column {column!r}")
    return _text(row, column)


def _numbers(row: Row, column: str) -> list[int]:
    values = row.get(column)
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise DataError(
            f"column {column!r} holds {values!r:.60} ({type(values).__name__}); expected a list of integers"
        )
    return list(map(int, values))
