"""A row in, by the form of its columns; tokens, and which of them are supervised, out."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from todi_offline.data.encoder import Encoder, Message, apply_template, ended, first_ids, ids_of, next_ids, render
from todi_offline.data.sources import Row
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

ROLES = ("system", "developer", "user", "assistant")


class Dropped(Exception):  # noqa: N818 -- no error of anybody's
    """The row gives no example, and is counted under this name."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence before it is cut."""

    ids: list[int]
    supervised: list[bool]
    """[token]: whether the token itself is to be predicted."""
    prompt_cut: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """What the columns mean, and how a row of them is encoded."""

    name: str
    encode: Callable[[Encoder, Row], Tokens]
    template: str | None = None


def recognise_form(first: Any, encoder: Encoder, where: str) -> Form:
    """Return the form that the columns of the first row have."""
    columns = columns_of(first, f"row 0 of {where}")
    answer = "output" if "output" in columns else "response"
    if "messages" in columns:
        return Form("messages", _encode_messages, "chat")
    if {"prompt", "completion"} <= columns.keys():
        return Form("prompt + completion", _encode_completion, "chat" if isinstance(columns["prompt"], list) else None)
    if {"instruction", answer} <= columns.keys():
        template = None if "prompt" in columns else "chat" if encoder.template else "alpaca"
        return Form(f"instruction + {answer}", partial(_encode_instruction, answer, template), template)
    if "text" in columns:
        return Form("text", _encode_text)
    raise DataError(
        f"{where} has the columns {', '.join(map(str, columns))}; expected messages, or prompt and completion, "
        "or instruction (and input) and output or response, or text: rename its columns"
    )


def columns_of(row: Any, where: str) -> Row:
    """Return a row, or refuse what is none."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected columns with their values")
    return row


def _encode_text(encoder: Encoder, row: Row) -> Tokens:
    ids = ended(encoder, first_ids(encoder, _filled(_text(row, "text"))))
    return Tokens(ids, [True] * len(ids))


def _encode_completion(encoder: Encoder, row: Row) -> Tokens:
    if isinstance(row.get("prompt"), list):
        return _encode_chat_pair(encoder, _messages(row, "prompt"), _messages(row, "completion"))
    return _encode_pair(encoder, _text(row, "prompt"), _text(row, "completion"))


def _encode_instruction(answer: str, template: str | None, encoder: Encoder, row: Row) -> Tokens:
    response = _text(row, answer)
    if template is None:
        return _encode_pair(encoder, _text(row, "prompt"), response)
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else _text(row, "input")
    if template == "alpaca":
        layout = ALPACA_WITH_INPUT if context else ALPACA
        return _encode_pair(encoder, layout.format(instruction=instruction, input=context), response)
    question = f"{instruction}\n\n{context}" if context else instruction
    return _encode_chat_pair(
        encoder, [{"role": "user", "content": question}], [{"role": "assistant", "content": response}]
    )


def _encode_pair(encoder: Encoder, prompt: str, response: str) -> Tokens:
    prompt_ids = first_ids(encoder, prompt)
    limit = encoder.config.max_prompt_length
    cut = len(prompt_ids) > limit
    if cut:
        start = encoder.start[:limit]
        prompt_ids = start + prompt_ids[len(prompt_ids) - limit + len(start) :]
    response_ids = ended(encoder, next_ids(encoder, _filled(response)))
    return Tokens(prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids), prompt_cut=cut)


def _encode_messages(encoder: Encoder, row: Row) -> Tokens:
    if row.get("tools"):
        raise DataError("it has tools, which are not supported; take such rows out")
    messages = _messages(row, "messages")
    if encoder.marks_answers:
        return _encode_marked(encoder, messages)
    return _encode_turns(encoder, messages, first=0)


def _encode_chat_pair(encoder: Encoder, prompt: list[Message], answer: list[Message]) -> Tokens:
    """Encode a prompt and its answer; too long a prompt loses the beginning of its last message."""
    tokens = _encode_turns(encoder, prompt + answer, first=len(prompt))
    limit = encoder.config.max_prompt_length
    if tokens.supervised.index(True) <= limit:
        return tokens
    *before, last = prompt

    def without(num_chars: int) -> list[Message]:
        return [*before, last | {"content": last["content"][num_chars:]}]

    def fits(num_chars: int) -> bool:
        return len(ids_of(encoder, render(encoder, without(num_chars), asks=True))) <= limit

    num_chars = bisect.bisect_left(range(len(last["content"])), True, key=fits)
    if num_chars == len(last["content"]):
        raise Dropped("num_prompt_too_long")
    tokens = _encode_turns(encoder, without(num_chars) + answer, first=len(prompt))
    return replace(tokens, prompt_cut=True)


def _encode_turns(encoder: Encoder, messages: list[Message], first: int) -> Tokens:
    """Encode a conversation whose assistant turns from `first` on are supervised.

    A turn is what the template adds to the conversation before it that asks for an answer; so what stands before a
    turn is what a model is asked with.
    """
    answers = _answers(messages, first)
    whole = render(encoder, messages)
    ids: list[int] = []
    supervised: list[bool] = []
    end = 0
    for index in answers:
        start, stop = _turn(encoder, messages, index, whole)
        for text, is_answer in ((whole[end:start], False), (whole[start:stop], True)):
            more = next_ids(encoder, text) if ids else ids_of(encoder, text)
            ids += more
            supervised += [is_answer] * len(more)
        end = stop
    return _closed(encoder, ids, supervised)


def _answers(messages: list[Message], first: int = 0) -> list[int]:
    """Return which messages are the assistant's, from `first` on; a blank one drops the row."""
    answers = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not answers:
        raise Dropped("num_unsupervised")
    for index in answers:
        _filled(messages[index]["content"])
    return answers


def _turn(encoder: Encoder, messages: list[Message], index: int, whole: str) -> tuple[int, int]:
    """Return where an assistant turn starts and stops in the rendered conversation, end-of-turn token included."""
    if index == 0:
        raise DataError("its first message is the assistant's, which answers nothing; take that message out")
    before = render(encoder, messages[:index], asks=True)
    after = render(encoder, messages[: index + 1])
    if not whole.startswith(after):  # as with Phi 3, which writes EOS after the last message of all
        after = after.removesuffix(encoder.closing[encoder.eos])
    if not (whole.startswith(after) and after.startswith(before)):
        raise DataError(
            f"the chat template writes messages 0 to {index} in another way when others follow, so the answer among "
            "them cannot be told apart; use a template with {% generation %} blocks, or rows of one answer each"
        )
    turn = after[len(before) :].rstrip()
    ends = turn.endswith(tuple(encoder.closing.values()))
    return len(before), len(before) + len(turn) if ends else len(after)


def _encode_marked(encoder: Encoder, messages: list[Message]) -> Tokens:
    """Encode a conversation whose template marks the answers itself, with {% generation %} blocks."""
    _answers(messages)
    rendered = apply_template(encoder, messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, marked = rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]]
    # Some templates leave the end-of-turn token out of the block.
    ends = [before and token in encoder.closing for token, before in zip(ids, [False, *marked], strict=False)]
    supervised = [mark or end for mark, end in zip(marked, ends, strict=True)]
    if not any(supervised):
        raise Dropped("num_unsupervised")
    stop = len(supervised) - supervised[::-1].index(True)
    return _closed(encoder, ids[:stop], supervised[:stop])


def _closed(encoder: Encoder, ids: list[int], supervised: list[bool]) -> Tokens:
    """End a conversation with EOS where its template has written no end-of-turn token."""
    if ids[-1] in encoder.closing:
        return Tokens(ids, supervised)
    return Tokens([*ids, encoder.eos], [*supervised, True])


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise DataError(f"it has no column {column!r}, which the first row has")
    return _string(row[column], f"column {column!r}")


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} holds {value!r:.60} ({type(value).__name__}); expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character ({error}); repair its encoding") from error
    return value


def _filled(text: str) -> str:
    if not text.strip():
        raise Dropped("num_empty")
    return text


def _messages(row: Row, column: str) -> list[Message]:
    messages = row.get(column)
    if not isinstance(messages, list | tuple):
        raise DataError(
            f"column {column!r} holds {messages!r:.60} ({type(messages).__name__}); expected a list of messages"
        )
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}; expected an object with role and content")
    if message.get("role") not in ROLES or message.get("tool_calls"):
        found = "tool calls" if message.get("tool_calls") else f"the role {message.get('role')!r}"
        raise DataError(f"{where} has {found}; expected a text by one of {', '.join(ROLES)}: take such rows out")
    _string(message.get("content"), f"the content of {where}")
    return {key: value for key, value in message.items() if value is not None}
