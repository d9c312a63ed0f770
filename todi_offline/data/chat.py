"""A conversation comes in; pieces of its text go out, each supervised or not.

The supervised text is the text that the model would generate after the generation prompt, including the end-of-turn
token. Text that the template adds after that prompt, such as an empty <think></think>, is context only.
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
"""The text of each family for a turn without thoughts. Its beginning may be part of the generation prompt."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, tools, and further arguments for the chat template."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    options: Mapping[str, Any]

    def __getitem__(self, part: slice) -> "Conversation":
        """Return a part of the messages, with the same tools and options."""
        return Conversation(self.messages[part], self.tools, self.options)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the text of a rendered conversation."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation up to its last supervised character."""

    pieces: tuple[Piece, ...]
    lost_thoughts: bool
    """The template left out the thoughts of a supervised turn."""


def prompt_text(chat: ChatTemplate, conversation: Conversation) -> str:
    """Return the text of a conversation, with the generation prompt at its end."""
    return render(chat, conversation.messages, conversation.options, conversation.tools, asks=True)


def render_turns(chat: ChatTemplate, conversation: Conversation, answers: Sequence[int]) -> Rendered:
    """Render a conversation and mark the supervised text of the messages at the indices `answers`.

    Raises:
        DataError: the template refuses the conversation, or the answers cannot be located in its text.
    """
    whole, marks = render_marked(chat, conversation.messages, conversation.options, conversation.tools)
    spans: list[Span] = []
    lost = False
    for index in answers:
        span = _find_turn(chat, conversation, index, whole, marks)
        text = whole[slice(*span)]
        _require_calls(conversation.messages[index], text)
        lost |= any(thought not in text for thought in _thoughts(conversation.messages[index]))
        spans += _spans_in_blocks(chat, whole, span, marks) if chat.marks_answers else [span]
    pieces: list[Piece] = []
    end = 0
    for start, stop in spans:
        pieces += [Piece(whole[end:start], False), Piece(whole[start:stop], True)]
        end = stop
    return Rendered(tuple(piece for piece in pieces if piece.text), lost)


def _find_turn(chat: ChatTemplate, conversation: Conversation, index: int, whole: str, marks: Sequence[Span]) -> Span:
    """Return the start and stop of the part of a turn that a model would generate."""
    if index == 0:
        raise DataError("the first message is the assistant's, which answers nothing; remove that message")
    traits = traits_of(chat, conversation.options)
    span = _find_turn_after_prompt(chat, conversation, index, whole, traits)
    if span is None:
        span = _find_turn_in_blocks(conversation, index, whole, marks, traits, chat)
    if span is None:
        raise DataError(
            f"the chat template rewrites messages 0 to {index} when more messages follow, so the answer among them "
            "cannot be located; pip install 'todi-offline[trl]', which has training templates for many families, name "
            "a template that keeps earlier turns (--chat-template FILE), or use rows with one answer each"
        )
    start, stop = span
    scaffold = _EMPTY_THOUGHTS.match(whole, start, stop)
    return (scaffold.end() if scaffold else start), stop


def _find_turn_after_prompt(
    chat: ChatTemplate, conversation: Conversation, index: int, whole: str, traits: Traits
) -> Span | None:
    """Render the messages up to a turn and take the text after the generation prompt, if `whole` has the same text."""
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
    """Return two stops of the turn that begins at `start`: with its end-of-turn token, and without."""
    if traits.end_of_turn and (end := text.rfind(traits.end_of_turn, start)) >= 0:
        return end + len(traits.end_of_turn), end
    turn = text[start:].rstrip()
    special = next((token for token in chat.specials if turn.endswith(token)), None)
    if special is not None:
        return start + len(turn), start + len(turn) - len(special)
    return len(text), start + len(turn)


def _find_turn_in_blocks(
    conversation: Conversation, index: int, whole: str, marks: Sequence[Span], traits: Traits, chat: ChatTemplate
) -> Span | None:
    """Take the generation block of a turn; skip the generation prompt if it is part of the block."""
    numbers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    blocks = _join_touching(marks)
    if len(blocks) != len(numbers):
        return None
    start, stop = blocks[numbers.index(index)]
    for excess in traits.prompt_excess:
        prompt = traits.question_to_answer.removesuffix(excess)
        position = whole.find(prompt, max(0, start - len(prompt)), start + len(prompt)) if prompt else -1
        if position >= 0:
            start = max(start, position + len(prompt))
            break
    return start, _stops(whole[:stop], start, traits, chat)[0]


def _join_touching(marks: Sequence[Span]) -> list[Span]:
    """Join blocks that touch: the template of Phi 3 ends with a block of EOS alone."""
    joined: list[Span] = []
    for start, stop in marks:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _spans_in_blocks(chat: ChatTemplate, whole: str, span: Span, marks: Sequence[Span]) -> list[Span]:
    """Return the parts of a turn in generation blocks; add the end-of-turn token if the template left it outside."""
    start, stop = span
    parts = [(max(start, first), min(stop, last)) for first, last in _join_touching(marks)]
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
            f"the chat template leaves out the call of the tool {lost[0]!r}; use a template that writes it "
            "(--chat-template FILE), or remove such rows"
        )


def adapt_conversation(chat: ChatTemplate, conversation: Conversation) -> Conversation:
    """Rename thoughts and convert the arguments of tool calls to the form that the template reads.

    Raises:
        DataError: the template ignores tools, tool calls or tool results that the conversation has.
    """
    traits = traits_of(chat, conversation.options)
    roles = {message["role"] for message in conversation.messages}
    for has_them, reads_them, feature in (
        (conversation.tools, traits.reads_tools, "tools"),
        (any(message.get("tool_calls") for message in conversation.messages), traits.reads_calls, "tool calls"),
        ("tool" in roles, traits.reads_results, "tool results"),
    ):
        if has_them and not reads_them:
            raise DataError(
                f"the chat template leaves out {feature}; use a template that reads them (--chat-template FILE), or "
                "remove such rows"
            )
    messages = tuple(_adapt_message(message, traits) for message in conversation.messages)
    return Conversation(messages, conversation.tools, conversation.options)


def _adapt_message(message: Message, traits: Traits) -> Message:
    if message["role"] != "assistant":
        return message
    if thoughts := _thoughts(message):
        message = message | dict.fromkeys(THOUGHTS, thoughts[0])
        if traits.thinks_in_content:
            message = message | {"content": f"<think>\n{thoughts[0]}\n</think>\n\n{message['content']}"}
    if message.get("tool_calls"):
        message = message | {"tool_calls": [_adapt_call(call, traits) for call in message["tool_calls"]]}
    return message


def _adapt_call(call: Any, traits: Traits) -> Any:
    """Return a tool call whose arguments are an object, or JSON text if the template expects text."""
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
