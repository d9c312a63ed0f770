"""Messages come in; tokens go out, each supervised or not."""

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from todi_offline.data.chat import ROLES, Conversation, adapt_conversation, prompt_text, render_turns
from todi_offline.data.encoder import Encoder, ids_of, ids_of_pieces
from todi_offline.data.templates import THOUGHTS, ChatTemplate, Message
from todi_offline.data.tokens import Dropped, Row, Tokens, drop_if_blank, string_of
from todi_offline.errors import DataError


def read_messages(row: Row, column: str) -> list[Message]:
    """Return the messages in a column.

    Raises:
        DataError: the column holds something else.
    """
    messages = row.get(column)
    if not isinstance(messages, list | tuple):
        raise DataError(
            f"column {column!r} holds {messages!r:.60} ({type(messages).__name__}); expected a list of messages"
        )
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def read_conversation(encoder: Encoder, row: Row, messages: Sequence[Message]) -> Conversation:
    """Return messages with the tools and the template arguments that the row and the config give."""
    tools: list[Any] | None = _json_of(row, "tools", list) or None
    options = {**encoder.config.chat_template_kwargs, **(_json_of(row, "chat_template_kwargs", Mapping) or {})}
    if tools is not None:
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    conversation = Conversation(tuple(messages), None if tools is None else tuple(tools), options)
    return adapt_conversation(_chat_of(encoder), conversation)


def encode_conversation(encoder: Encoder, conversation: Conversation) -> Tokens:
    """Encode a conversation. All answers of the assistant are supervised, or those after the last question.

    Raises:
        Dropped: nothing is supervised, an answer is blank, or the prompt cannot be cut to its limit.
    """
    messages = conversation.messages
    questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if encoder.config.supervise == "last" and questions:
        return encode_exchange(encoder, conversation, questions[-1] + 1)
    answers = _answers(messages)
    tokens = _encode(encoder, conversation, answers)
    if tokens.supervised.index(True) < encoder.config.max_length:
        return tokens
    return encode_exchange(encoder, conversation, answers[0])


def encode_exchange(encoder: Encoder, conversation: Conversation, num_prompt: int) -> Tokens:
    """Encode a conversation whose first `num_prompt` messages are the prompt.

    A prompt that is too long loses its oldest turns, never the system message, and then the middle of its last message.

    Raises:
        Dropped: nothing is supervised, an answer is blank, or the prompt cannot be cut to its limit.
    """
    answers = _answers(conversation.messages, num_prompt)
    tokens = _encode(encoder, conversation, answers)
    limit = encoder.config.prompt_limit
    if tokens.supervised.index(True) <= limit:
        return tokens
    after = conversation.messages[num_prompt:]
    for prompt in _shortened(encoder, conversation[:num_prompt], limit):
        shorter = replace(conversation, messages=(*prompt, *after))
        tokens = _encode(encoder, shorter, _answers(shorter.messages, len(prompt)))
        if tokens.supervised.index(True) <= limit:
            return replace(tokens, prompt_cut=True)
    raise Dropped("num_prompt_too_long")


def _encode(encoder: Encoder, conversation: Conversation, answers: Sequence[int]) -> Tokens:
    """Encode a conversation up to the last of these answers, one piece at a time."""
    rendered = render_turns(_chat_of(encoder), conversation, answers)
    ids: list[int] = []
    supervised: list[bool] = []
    texts = [piece.text for piece in rendered.pieces]
    for piece, piece_ids in zip(rendered.pieces, ids_of_pieces(encoder, texts) if texts else [], strict=True):
        ids += piece_ids
        supervised += [piece.supervised] * len(piece_ids)
    if not any(supervised):
        raise Dropped("num_unsupervised")
    if ids[-1] not in encoder.closing:  # the template wrote no end-of-turn token
        ids, supervised = [*ids, encoder.eos], [*supervised, True]
    return Tokens(ids, supervised, lost_thoughts=rendered.lost_thoughts)


def _shortened(encoder: Encoder, prompt: Conversation, limit: int) -> Iterator[tuple[Message, ...]]:
    """Yield shorter prompts: first without the oldest turns, then without the middle of the last message."""
    num_fixed = next((n for n, m in enumerate(prompt.messages) if m["role"] not in ("system", "developer")), 0)
    fixed, turns = prompt.messages[:num_fixed], prompt.messages[num_fixed:]

    def length(messages: Sequence[Message]) -> int:
        return len(ids_of(encoder, prompt_text(_chat_of(encoder), replace(prompt, messages=(*fixed, *messages)))))

    starts = [number for number, message in enumerate(turns) if message["role"] == "user" and number > 0]
    for start in starts:
        turns = prompt.messages[num_fixed + start :]
        if length(turns) <= limit:
            yield (*fixed, *turns)
            return
    *before, last = turns
    text = last["content"]

    def without(num_chars: int) -> Message:
        head = (len(text) - num_chars + 1) // 2
        return last | {"content": text[:head] + text[head + num_chars :]}

    num_chars = bisect.bisect_left(
        range(len(text)), True, key=lambda number: length([*before, without(number)]) <= limit
    )
    if num_chars < len(text):
        yield (*fixed, *before, without(num_chars))


def _answers(messages: Sequence[Message], first: int = 0) -> list[int]:
    """Return the indices from `first` on of the assistant's messages, except those of weight 0.

    Raises:
        Dropped: there is no such message, or one is blank.
    """
    answers = [
        index
        for index in range(first, len(messages))
        if messages[index]["role"] == "assistant" and messages[index].get("weight") != 0
    ]
    if not answers:
        raise Dropped("num_unsupervised")
    for index in answers:
        if not messages[index].get("tool_calls"):
            drop_if_blank(messages[index]["content"])
    return answers


def _chat_of(encoder: Encoder) -> ChatTemplate:
    assert encoder.chat is not None, "the form asks for a chat template"
    return encoder.chat


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}; expected an object with role and content")
    if message.get("role") not in ROLES:
        raise DataError(f"{where} has the role {message.get('role')!r}; expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    content = "" if calls and message.get("content") is None else message.get("content")
    string_of(content, f"the content of {where}")
    for name in THOUGHTS:
        if message.get(name) is not None:
            string_of(message[name], f"{name} of {where}")
    if calls and not all(isinstance(call, Mapping) and "name" in call.get("function", call) for call in calls):
        raise DataError(f"{where} has the tool calls {calls!r:.60}; expected objects with function, name and arguments")
    read: Message = _without_nulls({**message, "content": content})
    return read


def _without_nulls(value: Any) -> Any:
    """Return a value without keys that are null: Arrow gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def _json_of(row: Row, column: str, kind: type) -> Any:
    """Return the list or object in a column; a text is parsed as JSON."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except ValueError as error:
            raise DataError(f"column {column!r} holds {value!r:.60}, which is not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise DataError(f"column {column!r} holds {value!r:.60}; expected {'a list' if kind is list else 'an object'}")
    return _without_nulls(value)
