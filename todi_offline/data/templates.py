"""A tokenizer and settings come in; the chat template to render with goes out, and how that template writes a turn.

A template works for conversations of several turns if it writes the last turn in the same way as earlier turns. If the
tokenizer's own template does not, or writes no end-of-turn token, the training template that `trl` publishes is used.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from todi_offline.errors import DataError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""The keys under which families keep the thoughts of a model before its answer."""

_QUESTION, _ANSWER, _THOUGHT, _TOOL = "\ue000", "\ue001", "\ue002", "tool\ue003"
"""Characters of the private use area: no template writes them by itself."""

# Today's date would change the prompts from day to day: a capture could not resume, nor training find its examples.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True, slots=True)
class Traits:
    """How a template writes a turn, measured on small conversations."""

    question_to_answer: str
    """The text between a question and the start of the answer."""
    prompt_excess: tuple[str, ...]
    """Ends of the generation prompt that a rendered turn may lack, such as DeepSeek's <think>; shortest first."""
    end_of_turn: str
    """The special token that ends a turn; empty if the template writes none."""
    rewrites: bool
    """The template changes a turn when more turns follow."""
    thinks_in_content: bool
    """The template reads thoughts only in the content, between <think> and </think>, and from no key of their own."""
    reads_tools: bool
    reads_calls: bool
    reads_results: bool
    arguments_as_text: bool
    """The template expects the arguments of a tool call as JSON text."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template, its tokenizer and its origin."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    origin: str
    """`tokenizer`, `trl` or `given`."""
    specials: tuple[str, ...]
    """The texts of the tokenizer's special tokens, longest first."""
    traits: dict[str, Traits] = field(default_factory=dict)
    """The traits measured so far, by template arguments as JSON."""

    @property
    def marks_answers(self) -> bool:
        """Whether the template has {% generation %} blocks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", specials: Sequence[str], given: str | None, options: Mapping[str, Any]
) -> ChatTemplate:
    """Return the template to use: `given` (a file, or the template itself), else the tokenizer's own or trl's.

    Raises:
        ModelError: there is no template.
    """
    longest_first = tuple(sorted(specials, key=len, reverse=True))
    if given is not None:
        return ChatTemplate(tokenizer, read_template(given), "given", longest_first)
    if not tokenizer.chat_template:
        raise ModelError(
            "the rows are conversations, and the tokenizer has no chat template; name one (--chat-template FILE), take "
            "the tokenizer of an instruct model, or use rows with prompt and completion as texts"
        )
    own = ChatTemplate(tokenizer, tokenizer.get_chat_template(), "tokenizer", longest_first)
    traits = traits_of(own, options)
    published = _published_template(tokenizer) if traits.rewrites or not traits.end_of_turn else None
    return own if published is None else ChatTemplate(tokenizer, published, "trl", longest_first)


def with_recorded_template(tokenizer: Any, recipes: Iterable[Mapping[str, Any]]) -> Any:
    """Return a tokenizer with the chat template of a cache's data: a student is served with the template it learnt.

    A warning is logged if the template differs from the tokenizer's own. No token id changes.
    """
    recorded = {recipe["chat_template"] for recipe in recipes if recipe.get("chat_template")}
    if len(recorded) > 1:
        logger.warning("the cache was captured with %s chat templates; the student keeps its own", len(recorded))
    if len(recorded) != 1 or tokenizer.chat_template in recorded:
        return tokenizer
    logger.warning("the student's chat template differs from the cache's; the cache's is saved with the student")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = recorded.pop()
    return tokenizer


def read_template(given: str) -> str:
    """Return the text of a chat template; `given` is the name of its file, or the template itself.

    Raises:
        DataError: the file cannot be read.
    """
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise DataError(f"the chat template {given} cannot be read: {reason}; name a file that holds one") from error


def _published_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return trl's training template for the tokenizer; None if trl has none or is not installed."""
    if find_spec("trl") is None:
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        published: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # trl does not know the template
        return None
    return published


def render(
    chat: ChatTemplate,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    tools: Sequence[Any] | None = None,
    *,
    asks: bool = False,
) -> str:
    """Return a conversation as text; with `asks`, followed by the generation prompt.

    Raises:
        DataError: the template refuses the conversation.
    """
    return _rendered(chat, messages, options, tools, asks, marked=False)[0]


def render_marked(
    chat: ChatTemplate, messages: Sequence[Message], options: Mapping[str, Any], tools: Sequence[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and the start and stop of each {% generation %} block.

    Raises:
        DataError: the template refuses the conversation.
    """
    return _rendered(chat, messages, options, tools, False, marked=chat.marks_answers)


def _rendered(
    chat: ChatTemplate,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    tools: Sequence[Any] | None,
    asks: bool,
    marked: bool,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    text = _FIXED_DATE + chat.text if "strftime_now" in chat.text else chat.text
    values = {**chat.tokenizer.special_tokens_map, **options}
    try:
        texts, marks = render_jinja_template(
            [list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=text,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=asks,
            **values,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"the chat template refuses its messages: {first_line(error)}") from error
    return texts[0], marks[0] if marked else []


def traits_of(chat: ChatTemplate, options: Mapping[str, Any]) -> Traits:
    """Return how the template writes turns with these arguments; measured once and remembered."""
    key = json.dumps(options, sort_keys=True, default=str)
    if key not in chat.traits:
        chat.traits[key] = _Probe(chat, options).traits()
    return chat.traits[key]


@dataclass(frozen=True, slots=True)
class _Probe:
    """Renders small conversations to measure a template; a conversation that the template refuses gives no text."""

    chat: ChatTemplate
    options: Mapping[str, Any]

    def traits(self) -> Traits:
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        thoughtful = answer | dict.fromkeys(THOUGHTS, _THOUGHT)
        asked = self._between(self._text([question], asks=True), _QUESTION)
        turn, thoughtful_turn = self._text([question, answer]), self._text([question, thoughtful])
        before = [self._between(turn, _QUESTION, _ANSWER), self._between(thoughtful_turn, _QUESTION, _THOUGHT)]
        excess = {asked[_common_prefix_length(asked, text) :] for text in before if text}
        in_content = answer | {"content": f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"}
        keeps_content = _THOUGHT in self._text([question, in_content])
        as_text, calls = self._calls(question)
        return Traits(
            question_to_answer=asked,
            prompt_excess=tuple(sorted(excess | {""}, key=len)),
            end_of_turn=self._end_of_turn(self._between(turn, _ANSWER)),
            rewrites=not keeps_content
            or any(self._rewrites([question, one, question, answer]) for one in (answer, thoughtful)),
            thinks_in_content=keeps_content and _THOUGHT not in thoughtful_turn and asked.rstrip().endswith("<think>"),
            reads_tools=_TOOL in self._text([question], tools=[_function(_TOOL)]),
            reads_calls=_TOOL in calls,
            reads_results=_THOUGHT in calls,
            arguments_as_text=as_text,
        )

    def _text(self, messages: Sequence[Message], **settings: Any) -> str:
        try:
            return render(self.chat, messages, self.options, **settings)
        except DataError:
            return ""

    @staticmethod
    def _between(text: str, start: str, stop: str | None = None) -> str:
        """Return the text after `start`, up to `stop`; empty if either is missing."""
        _, separator, after = text.partition(start)
        if stop is None or not separator:
            return after
        return after[: after.index(stop)] if stop in after else ""

    def _rewrites(self, messages: Sequence[Message]) -> bool:
        last, _, _ = self._text(messages[:2]).partition(_ANSWER)
        return not self._text(messages).startswith(last + _ANSWER)

    def _end_of_turn(self, after: str) -> str:
        """Return the last of the special tokens directly after an answer."""
        special = "|".join(map(re.escape, self.chat.specials))
        match = re.match(rf"\s*((?:{special})+)", after) if special else None
        return re.findall(special, match[1])[-1] if match else ""

    def _calls(self, question: Message) -> tuple[bool, str]:
        """Return whether the template expects arguments as text, and a conversation with a tool call and its result."""
        for as_text in (False, True):
            arguments: Any = {"value": 1}
            function = {"name": _TOOL, "arguments": json.dumps(arguments) if as_text else arguments}
            call = {"type": "function", "id": "abcdefghi", "function": function}
            asking = {"role": "assistant", "content": "", "tool_calls": [call]}
            result = {"role": "tool", "name": _TOOL, "tool_call_id": "abcdefghi", "content": _THOUGHT}
            text = self._text([question, asking, result, {"role": "assistant", "content": _ANSWER}])
            if text:
                return as_text, text
        return False, self._text([question, asking])


def _common_prefix_length(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _function(name: str) -> dict[str, Any]:
    properties = {"value": {"type": "integer", "description": "A number."}}
    parameters = {"type": "object", "properties": properties, "required": ["value"]}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}
