"""A conversation in, its text in pieces out, each supervised or not.

Supervised is what the model would generate after the generation prompt, its end-of-turn token included. What the
template adds by itself between the two, such as an empty <think></think>, is read and not supervised.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from todi_offline.data.templates import (
    THOUGHTS,
    ChatTemplate,
    Message,
    Traits,
    render,
    render_marked,
    traits_of,
)
from todi_offline.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

_EMPTY_THOUGHTS = re.compile(
    r"\s*(?:"
    r"(?:<(?:seed:)?think(?:ing)?>\s*)?</(?:seed:)?think(?:ing)?>"
    r"|<\|channel>thought\s*<channel\|>"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|\[THINK\]\s*\[/THINK\]"
    r")\s*"
)
"""What families write where a model has not thought. The beginning may stand in the generation prompt."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what else their template is given."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    options: Mapping[str, Any]

    def __getitem__(self, part: slice) -> "Conversation":
        """Return a part of the messages, with the same tools and options."""
        return Conversation(self.messages[part], self.tools, self.options)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation up to its last supervised character."""

    pieces: tuple[Piece, ...]
    lost_thoughts: bool
    """The template has left the thoughts of a supervised turn out."""


def prompt_text(chat: ChatTemplate, conversation: Conversation) -> str:
    """Return a conversation up to where the assistant is to answer."""
    return render(chat, conversation.messages, conversation.options, conversation.tools, asks=True)


def rendered_turns(chat: ChatTemplate, conversation: Conversation, answers: Sequence[int]) -> Rendered:
    """Render a conversation, and tell what is supervised of the messages with these numbers.

    Raises:
        DataError: the template refuses the conversation, or writes it so that the answers cannot be told apart.
    """
    whole, marks = render_marked(chat, conversation.messages, conversation.options, conversation.tools)
    spans: list[Span] = []
    lost = False
    for index in answers:
        span = _turn(chat, conversation, index, whole, marks)
        text = whole[slice(*span)]
        _require_calls(conversation.messages[index], text)
        lost |= any(thought not in text for thought in _thoughts(conversation.messages[index]))
        spans += _marked_part(chat, whole, span, marks) if chat.marks_answers else [span]
    pieces: list[Piece] = []
    end = 0
    for start, stop in spans:
        pieces += [Piece(whole[end:start], False), Piece(whole[start:stop], True)]
        end = stop
    return Rendered(tuple(piece for piece in pieces if piece.text), lost)


def _turn(chat: ChatTemplate, conversation: Conversation, index: int, whole: str, marks: Sequence[Span]) -> Span:
    """Return from where to where a turn is what a model would generate."""
    if index == 0:
        raise DataError("its first message is the assistant's, which answers nothing; take that message out")
    traits = traits_of(chat, conversation.options)
    span = _turn_as_last(chat, conversation, index, whole, traits)
    if span is None:
        span = _turn_in_marks(conversation, index, whole, marks, traits, chat)
    if span is None:
        raise DataError(
            f"the chat template writes messages 0 to {index} in another way when others follow, so the answer among "
            "them cannot be told apart; pip install 'todi-offline[trl]', which knows training templates of many "
            "families, name a template that keeps earlier turns (--chat-template FILE), or use rows of one answer each"
        )
    start, stop = span
    scaffold = _EMPTY_THOUGHTS.match(whole, start, stop)
    return (scaffold.end() if scaffold else start), stop


def _turn_as_last(
    chat: ChatTemplate, conversation: Conversation, index: int, whole: str, traits: Traits
) -> Span | None:
    """Find a turn as what follows the generation prompt where it is the last one, if it stands so in the whole."""
    messages = conversation.messages
    before = prompt_text(chat, conversation[:index])
    starts = [len(before) - len(excess) for excess in traits.prompt_excess if before.endswith(excess)]
    start = next((start for start in starts if whole.startswith(before[:start])), None)
    if start is None:
        return None
    for message in (messages[index], _without_thoughts(messages[index])):
        is_last = index == len(messages) - 1 and message is messages[index]
        turn = Conversation((*messages[:index], message), conversation.tools, conversation.options)
        after = whole if is_last else render(chat, turn.messages, turn.options, turn.tools)
        for stop in _stops(after, start, traits, chat):
            if stop > start and whole.startswith(after[:stop]):
                return start, stop
    return None


def _stops(text: str, start: int, traits: Traits, chat: ChatTemplate) -> tuple[int, int]:
    """Return where the turn that begins at `start` stops, with its end-of-turn token and without."""
    if traits.end_of_turn and (found := text.rfind(traits.end_of_turn, start)) >= 0:
        return found + len(traits.end_of_turn), found
    turn = text[start:].rstrip()
    special = next((token for token in chat.specials if turn.endswith(token)), None)
    if special is not None:
        return start + len(turn), start + len(turn) - len(special)
    return len(text), start + len(turn)


def _turn_in_marks(
    conversation: Conversation, index: int, whole: str, marks: Sequence[Span], traits: Traits, chat: ChatTemplate
) -> Span | None:
    """Find a turn as the generation block of its number; the generation prompt may stand in the block."""
    numbers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    blocks = _joined(marks)
    if len(blocks) != len(numbers):
        return None
    start, stop = blocks[numbers.index(index)]
    for excess in traits.prompt_excess:
        prompt = traits.question_to_answer.removesuffix(excess)
        found = whole.find(prompt, max(0, start - len(prompt)), start + len(prompt)) if prompt else -1
        if found >= 0:
            start = max(start, found + len(prompt))
            break
    return start, _stops(whole[:stop], start, traits, chat)[0]


def _joined(marks: Sequence[Span]) -> list[Span]:
    """Join blocks that touch: Phi 3 has one of EOS alone after the last."""
    joined: list[Span] = []
    for start, stop in marks:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _marked_part(chat: ChatTemplate, whole: str, span: Span, marks: Sequence[Span]) -> list[Span]:
    """Return what of a turn stands in generation blocks, and its end-of-turn token, which some leave out of them."""
    start, stop = span
    parts = [(max(start, first), min(stop, last)) for first, last in _joined(marks)]
    parts = [(first, last) for first, last in parts if first < last]
    special = "|".join(map(re.escape, chat.specials))
    if parts and special and re.fullmatch(rf"(?:\s|{special})*", whole[parts[-1][1] : stop]):
        parts[-1] = (parts[-1][0], stop)
    return parts


def _thoughts(message: Message) -> list[str]:
    return [message[name].strip() for name in THOUGHTS if isinstance(message.get(name), str)][:1]


def _without_thoughts(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in THOUGHTS}


def _require_calls(message: Message, text: str) -> None:
    names = [call.get("function", call).get("name") for call in message.get("tool_calls") or []]
    lost = [name for name in names if str(name) not in text]
    if lost:
        raise DataError(
            f"the chat template does not write the call of the tool {lost[0]!r}; use one that does (--chat-template "
            "FILE), or take such rows out"
        )


def adapted(chat: ChatTemplate, conversation: Conversation) -> Conversation:
    """Put thoughts under the names, and arguments into the form, that the template reads.

    Raises:
        DataError: it reads no tools, no calls or no results of tools, and there are some.
    """
    traits = traits_of(chat, conversation.options)
    roles = {message["role"] for message in conversation.messages}
    for there, read, what in (
        (conversation.tools, traits.reads_tools, "tools"),
        (any(message.get("tool_calls") for message in conversation.messages), traits.reads_calls, "calls of tools"),
        ("tool" in roles, traits.reads_results, "results of tools"),
    ):
        if there and not read:
            raise DataError(
                f"the chat template leaves {what} out; use one that reads them (--chat-template FILE), or take such "
                "rows out"
            )
    messages = tuple(_message_for(message, traits) for message in conversation.messages)
    return Conversation(messages, conversation.tools, conversation.options)


def _message_for(message: Message, traits: Traits) -> Message:
    if message["role"] != "assistant":
        return message
    if thoughts := _thoughts(message):
        message = message | dict.fromkeys(THOUGHTS, thoughts[0])
        if traits.thinks_in_content:
            message = message | {"content": f"<think>\n{thoughts[0]}\n</think>\n\n{message['content']}"}
    if message.get("tool_calls"):
        message = message | {"tool_calls": [_call_for(call, traits) for call in message["tool_calls"]]}
    return message


def _call_for(call: Any, traits: Traits) -> Any:
    """Return a tool call whose arguments are an object, or text where the template wants text."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and not traits.arguments_as_text:
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"the arguments of a tool call are not JSON: {arguments!r:.60}; repair them") from error
    elif traits.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function
