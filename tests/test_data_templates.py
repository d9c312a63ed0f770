"""The chat templates of real families: the supervised text of one turn, of two turns, of thoughts and of tool calls."""

import sys
from importlib import util

import numpy as np
import pytest
import torch
from support.families import FAMILIES, TEMPLATES, family_tokenizer
from support.tiny_models import llama

from todi_offline.cache.reader import open_cache
from todi_offline.capturing import capture
from todi_offline.data import DataConfig, examples_from_rows
from todi_offline.errors import DataError
from todi_offline.teacher.in_transformers import as_teacher

TURNS = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Nobody knows."},
    {"role": "user", "content": "And when?"},
    {"role": "assistant", "content": "Long ago."},
]
ANSWERS = ("Nobody knows.", "Long ago.")
THOUGHTS = ("Hm, who.", "When, when.")
THOUGHTFUL = [
    turn | ({"reasoning_content": thought} if thought else {})
    for turn, thought in zip(TURNS, (None, THOUGHTS[0], None, THOUGHTS[1]), strict=True)
]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "lookup", "arguments": {"word": "it"}}}
CALLING = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": "a pronoun"},
    TURNS[1],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "Which."}}},
    },
}

# The text that a model of the family generates after the generation prompt. {0} is the answer.
GENERATED = {
    "cohere2": "{0}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "cohere": "{0}<|END_OF_TURN_TOKEN|>",
    "deepseek": "{0}<｜end▁of▁sentence｜>",
    "gemma4": "{0}<turn|>",
    "gemma": "{0}<end_of_turn>",
    "glm4moe": "{0}<|user|>",
    "gptoss": "<|channel|>final<|message|>{0}<|return|>",
    "llama3": "{0}<|eot_id|>",
    "muse_glimmer": " to=user<|message|>{0}<|eot|>",
    "phi3": "{0}<|end|>",
    "": "{0}<|im_end|>",
}
# The same with a thought, {1}, for the families that have thoughts.
GENERATED_WITH_THOUGHT = {
    "deepseek_r1": "{1}\n</think>\n\n{0}<｜end▁of▁sentence｜>",
    "gemma4_v5": "<|channel>thought\n{1}\n<channel|>{0}<turn|>",
    "glm4moe": "\n<think>{1}</think>\n{0}<|user|>",
    "gptoss": "<|channel|>analysis<|message|>{1}<|end|><|start|>assistant<|channel|>final<|message|>{0}<|return|>",
    "lfm2_2_5": "<think>{1}</think>{0}<|im_end|>",
    "muse_glimmer": " to=self<|message|>{1}<|eom|><|start|>assistant to=user<|message|>{0}<|eot|>",
    "nemotron_3_5": "{1}</think>{0}<|im_end|>",
    "nemotron_3_ultra": "{1}</think>{0}<|im_end|>",
    "nemotron": "{1}\n</think>\n{0}<|im_end|>",
    "qwen3_instruct": None,
    "qwen3_": "{1}\n</think>\n\n{0}<|im_end|>",
    "qwen3": "<think>\n{1}\n</think>\n\n{0}<|im_end|>",
}
DROPS_EARLIER_THOUGHTS = ("gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "nemotron")
"""The template drops the thoughts of earlier turns by default."""
NO_SYSTEM = ("gemma",)
NO_TOOLS = (
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "lfm2",
    "llama3",
    "phi3",
    "phi3_5",
)


def of_family(table, name):
    return next((value for start, value in table.items() if name.startswith(start)), None)


def encoded(name, messages, **row):
    tokenizer = family_tokenizer(name)
    examples = examples_from_rows([{"messages": messages, **row}], DataConfig(max_length=4096), tokenizer)
    return examples, tokenizer


def supervised(examples, tokenizer):
    """Return each run of supervised text."""
    ids, mask = examples[0].token_ids, np.array([False, *examples[0].target_mask[:-1]])
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return [tokenizer.decode(ids[start:stop].tolist()) for start, stop in edges.reshape(-1, 2)]


def expected(name, *answers):
    texts = [of_family(GENERATED, name).format(answer) for answer in answers]
    # The template of gpt-oss ends an earlier turn with <|end|>; the model itself would generate <|return|>.
    return [text.removesuffix("<|return|>") for text in texts[:-1]] + texts[-1:]


def test_all_families_of_trl_are_covered():
    assert len(FAMILIES) == 34


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_turns", [1, 2])
def test_the_supervised_text_equals_the_answers(name, num_turns):
    examples, tokenizer = encoded(name, TURNS[: 2 * num_turns])
    assert supervised(examples, tokenizer) == expected(name, *ANSWERS[:num_turns])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_equal_the_rendered_text_and_the_prompt_equals_the_prompt_at_inference(name):
    examples, tokenizer = encoded(name, TURNS)
    template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + examples.recipe["chat_template"]
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=template)
    ids = examples[0].token_ids.tolist()
    assert whole.startswith(tokenizer.decode(ids))
    prompt = tokenizer.apply_chat_template(
        TURNS[:1], add_generation_prompt=True, chat_template=template, return_dict=False
    )
    if whole.startswith(tokenizer.decode(prompt)):  # no <think> that a rendered turn lacks
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_SYSTEM])
def test_a_system_message_is_context_only(name):
    examples, tokenizer = encoded(name, [{"role": "system", "content": "Be brief."}, *TURNS])
    assert "Be brief." in tokenizer.decode(examples[0].token_ids.tolist())
    assert supervised(examples, tokenizer) == expected(name, *ANSWERS)


def test_a_family_without_system_messages_refuses_one():
    with pytest.raises(DataError, match="refuses its messages: System role not supported"):
        encoded("gemma", [{"role": "system", "content": "Be brief."}, *TURNS])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_supervised_if_the_family_has_them_and_counted_if_the_template_drops_them(name, key):
    messages = [{key if at == "reasoning_content" else at: value for at, value in m.items()} for m in THOUGHTFUL]
    examples, tokenizer = encoded(name, messages)
    with_thought = of_family(GENERATED_WITH_THOUGHT, name)
    if with_thought is None:
        assert supervised(examples, tokenizer) == expected(name, *ANSWERS)
        assert examples.report.num_thoughts_lost == 1
        return
    drops = name.startswith(DROPS_EARLIER_THOUGHTS)
    first = expected(name, *ANSWERS)[0] if drops else with_thought.format(ANSWERS[0], THOUGHTS[0])
    assert supervised(examples, tokenizer) == [first, with_thought.format(ANSWERS[1], THOUGHTS[1])]
    assert examples.report.num_thoughts_lost == drops


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_are_supervised_and_tool_results_are_not(name, as_text):
    arguments = '{"word": "it"}' if as_text else {"word": "it", "other": None}
    call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
    messages = [message | ({"tool_calls": [call]} if "tool_calls" in message else {}) for message in CALLING]
    if name in NO_TOOLS:
        with pytest.raises(DataError, match=r"the chat template leaves out (tools|tool calls); use"):
            encoded(name, messages, tools=[TOOL])
        return
    examples, tokenizer = encoded(name, messages, tools=[TOOL])
    called, answered = supervised(examples, tokenizer)
    assert "lookup" in called
    assert "it" in called.partition("word")[2]
    assert "null" not in called
    assert answered == expected(name, ANSWERS[0])[-1]
    text = tokenizer.decode(examples[0].token_ids.tolist())
    assert "a pronoun" in text.replace(called, "")
    assert "a pronoun" not in called
    assert "Look a word up." in text


def test_the_arguments_of_tool_calls_are_text_if_the_family_expects_text():
    examples, tokenizer = encoded("deepseekv3", CALLING)
    assert supervised(examples, tokenizer)[0].count('```json\n{"word": "it"}\n```') == 1


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseekv3"])
def test_captured_rows_equal_the_logits_of_the_model_itself(name, tmp_path):
    tokenizer = family_tokenizer(name)
    model = llama(vocab_size=len(tokenizer))
    examples = examples_from_rows([{"messages": TURNS}, {"messages": THOUGHTFUL}], DataConfig(), tokenizer)
    capture(
        as_teacher(model, tokenizer), examples, tmp_path / "cache", k=16, tail_samples=0, encoding="f16", codec="fast"
    )
    cache = open_cache(tmp_path / "cache")
    for sequence in cache:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(sequence.token_ids.astype(np.int64))[None]).logits[0]
        logprobs = logits.log_softmax(-1)[torch.from_numpy(sequence.target_mask)].numpy()
        kept = np.take_along_axis(logprobs, sequence.targets.ids.astype(np.int64), 1)
        np.testing.assert_allclose(sequence.targets.logprobs, kept, atol=2e-2)


def test_arguments_of_the_template_come_from_the_settings_and_from_the_row():
    tokenizer = family_tokenizer("nemotron_3_nano")
    keep = {"truncate_history_thinking": False}
    row = {"messages": THOUGHTFUL}
    asked = examples_from_rows([row], DataConfig(chat_template_kwargs=keep), tokenizer)
    assert [one.startswith(THOUGHTS[n]) for n, one in enumerate(supervised(asked, tokenizer))] == [True, True]
    assert asked.report.num_thoughts_lost == 0
    assert asked.recipe["chat_template_kwargs"] == keep
    for column in (keep, '{"truncate_history_thinking": false}'):
        own = examples_from_rows([row | {"chat_template_kwargs": column}], DataConfig(), tokenizer)
        np.testing.assert_array_equal(own[0].token_ids, asked[0].token_ids)


def test_supervision_can_be_limited_to_the_last_answer():
    for messages, answers in ((TURNS, ["Long ago."]), (CALLING, ["lookup", "Nobody knows."])):
        tokenizer = family_tokenizer("qwen3")
        examples = examples_from_rows([{"messages": messages}], DataConfig(supervise="last"), tokenizer)
        texts = supervised(examples, tokenizer)
        assert len(texts) == len(answers)
        assert all(answer in text for answer, text in zip(answers, texts, strict=True))


def test_a_message_of_weight_zero_is_context_only():
    messages = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    examples, tokenizer = encoded("qwen2_5", messages)
    assert supervised(examples, tokenizer) == expected("qwen2_5", ANSWERS[1])
    assert "Nobody knows." in tokenizer.decode(examples[0].token_ids.tolist())


def test_a_template_can_be_given_as_a_file_and_is_part_of_the_recipe(tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATES["llama3"])
    tokenizer = family_tokenizer("llama3")
    expected_ids = encoded("llama3", TURNS)[0][0].token_ids
    tokenizer.chat_template = None
    config = DataConfig(chat_template=str(tmp_path / "chat.jinja"))
    examples = examples_from_rows([{"messages": TURNS}], config, tokenizer)
    np.testing.assert_array_equal(examples[0].token_ids, expected_ids)
    assert examples.recipe["chat_template"] == TEMPLATES["llama3"]
    assert examples.recipe["chat_template_from"] == "given"
    with pytest.raises(DataError, match=r"the chat template .*none.jinja cannot be read"):
        examples_from_rows([{"messages": TURNS}], DataConfig(chat_template=str(tmp_path / "none.jinja")), tokenizer)


def test_without_trl_the_error_names_both_solutions(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr("todi_offline.data.templates.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"todi-offline\[trl\].*--chat-template FILE"):
        encoded("qwen3", TURNS)
    examples, tokenizer = encoded("qwen3", TURNS[:2])
    assert supervised(examples, tokenizer) == expected("qwen3", ANSWERS[0])
