"""A tokenizer and settings in, the chat template that conversations are rendered with, and what it does, out.

A template serves conversations of several turns if it writes a turn in the same way whether it is the last one or not.
Where the tokenizer's own does not, or ends no turn, the training template that `trl` publishes for it is taken.
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
"""The names that families have for what a model thinks before it answers."""

_QUESTION, _ANSWER, _THOUGHT, _TOOL = "\ue000", "\ue001", "\ue002", "tool\ue003"
"""Of the private use area, so that no template writes them by itself."""

# As a date of today would change the prompt from one day to the next: a capture could not go on, nor match.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True, slots=True)
class Traits:
    """How a template writes a turn, found by rendering small conversations."""

    question_to_answer: str
    """What stands between a question and where the assistant is to answer."""
    prompt_excess: tuple[str, ...]
    """Ends of the generation prompt that a rendered turn may lack, as the <think> of DeepSeek; shortest first."""
    end_of_turn: str
    """The special token that ends a turn; empty where the template writes none."""
    rewrites: bool
    """It writes a turn in another way when others follow."""
    thinks_in_content: bool
    """Thoughts belong into the content, between <think> and </think>; it reads no key for them."""
    reads_tools: bool
    reads_calls: bool
    reads_results: bool
    arguments_as_text: bool
    """It wants the arguments of a tool call as JSON text."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template, and whose."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    origin: str
    """`tokenizer`, `trl` or `given`."""
    specials: tuple[str, ...]
    """The texts of the tokenizer's special tokens, the longest first."""
    traits: dict[str, Traits] = field(default_factory=dict)
    """What is known of it, by the arguments it was rendered with."""

    @property
    def marks_answers(self) -> bool:
        """Whether it has {% generation %} blocks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", specials: Sequence[str], given: str | None, options: Mapping[str, Any]
) -> ChatTemplate:
    """Return the template to use: the given one (a file or the template itself), else the tokenizer's own or trl's.

    Raises:
        ModelError: there is none.
    """
    longest_first = tuple(sorted(specials, key=len, reverse=True))
    if given is not None:
        return ChatTemplate(tokenizer, read_template(given), "given", longest_first)
    if not tokenizer.chat_template:
        raise ModelError(
            "the rows are conversations, and the tokenizer has no chat template; name one (--chat-template FILE), take "
            "the tokenizer of an instruct model, or give prompt and completion as texts"
        )
    own = ChatTemplate(tokenizer, tokenizer.get_chat_template(), "tokenizer", longest_first)
    traits = traits_of(own, options)
    published = _published_template(tokenizer) if traits.rewrites or not traits.end_of_turn else None
    return own if published is None else ChatTemplate(tokenizer, published, "trl", longest_first)


def with_recorded_template(tokenizer: Any, recipes: Iterable[Mapping[str, Any]]) -> Any:
    """Return a tokenizer with the chat template of a cache's data, for a student is served with what it learnt.

    A template that differs is reported. No id changes by it.
    """
    recorded = {recipe["chat_template"] for recipe in recipes if recipe.get("chat_template")}
    if len(recorded) > 1:
        logger.warning("the cache was captured with %s chat templates; the student keeps its own", len(recorded))
    if len(recorded) != 1 or tokenizer.chat_template in recorded:
        return tokenizer
    logger.warning("the student's chat template is not the one of the cache, which is saved with the student")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = recorded.pop()
    return tokenizer


def read_template(given: str) -> str:
    """Return a chat template: what is given is a file of it, or the template itself.

    Raises:
        DataError: the file cannot be read.
    """
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template {given} cannot be read: {first_line(error)}") from error


def _published_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return trl's training template for the tokenizer's own; None where there is none, or trl is not installed."""
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
    """Return a conversation as text; with `asks`, up to where the assistant is to answer.

    Raises:
        DataError: the template refuses the conversation.
    """
    return _rendered(chat, messages, options, tools, asks, marked=False)[0]


def render_marked(
    chat: ChatTemplate, messages: Sequence[Message], options: Mapping[str, Any], tools: Sequence[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and from where to where its {% generation %} blocks reach.

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
    """Return how the template writes turns with these arguments; looked at once."""
    key = json.dumps(options, sort_keys=True, default=str)
    if key not in chat.traits:
        chat.traits[key] = _Probe(chat, options).traits()
    return chat.traits[key]


@dataclass(frozen=True, slots=True)
class _Probe:
    """A template that is asked to render small conversations; what it refuses is empty."""

    chat: ChatTemplate
    options: Mapping[str, Any]

    def traits(self) -> Traits:
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        thoughtful = answer | dict.fromkeys(THOUGHTS, _THOUGHT)
        asked = self._between(self._text([question], asks=True), _QUESTION)
        turn, thoughtful_turn = self._text([question, answer]), self._text([question, thoughtful])
        before = [self._between(turn, _QUESTION, _ANSWER), self._between(thoughtful_turn, _QUESTION, _THOUGHT)]
        excess = {asked[_num_alike(asked, text) :] for text in before if text}
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
        """Return what follows `start`, up to `stop`; nothing where one is not there."""
        _, found, after = text.partition(start)
        if stop is None or not found:
            return after
        return after[: after.index(stop)] if stop in after else ""

    def _rewrites(self, messages: Sequence[Message]) -> bool:
        last, _, _ = self._text(messages[:2]).partition(_ANSWER)
        return not self._text(messages).startswith(last + _ANSWER)

    def _end_of_turn(self, after: str) -> str:
        """Return the last of the special tokens that follow an answer without a gap."""
        special = "|".join(map(re.escape, self.chat.specials))
        found = re.match(rf"\s*((?:{special})+)", after) if special else None
        return re.findall(special, found[1])[-1] if found else ""

    def _calls(self, question: Message) -> tuple[bool, str]:
        """Return whether arguments are to be text, and a conversation with a call and its result."""
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


def _num_alike(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _function(name: str) -> dict[str, Any]:
    properties = {"value": {"type": "integer", "description": "A number."}}
    parameters = {"type": "object", "properties": properties, "required": ["value"]}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}
