"""Conversations: the chat template decides the text, the assistant's turns are supervised."""

import numpy as np
import pytest
from support.rows import CHAT, PLAIN, ROWS, THREE_TURNS, encode, encode_one, marked
from support.tiny import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from todi_offline.errors import DataError, ModelError


def chat_tokenizer(template):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)


# Like Qwen 3: only the last turn keeps its thoughts.
DROPS_EARLIER_THOUGHTS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)


WITH_GENERATION_BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] INSIDE }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ AFTER }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_default_system_prompt_is_context_only():
    tokenizer = chat_tokenizer(WITH_DEFAULT_SYSTEM)
    text = marked(encode_one({"messages": THREE_TURNS}, tokenizer), tokenizer)
    assert text.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWho wrote it?")
    assert text.count("[") == 2
    assert "[Long ago.<|im_end|>]" in text


def test_generation_blocks_give_the_same_mask_as_the_generation_prompt():
    inside = WITH_GENERATION_BLOCKS.replace("INSIDE", "+ '<|im_end|>'").replace(
        "AFTER", "'\n' if message['role'] == 'assistant' else '<|im_end|>\n'"
    )
    example = encode_one({"messages": THREE_TURNS}, chat_tokenizer(inside))
    expected = encode_one({"messages": THREE_TURNS}, CHAT)
    np.testing.assert_array_equal(example.token_ids, expected.token_ids)
    np.testing.assert_array_equal(example.target_mask, expected.target_mask)


def test_an_end_of_turn_token_outside_the_generation_block_is_supervised_too():
    tokenizer = chat_tokenizer(WITH_GENERATION_BLOCKS.replace("INSIDE", "").replace("AFTER", "'<|im_end|>\n'"))
    example = encode_one({"messages": THREE_TURNS}, tokenizer)
    assert marked(example, tokenizer) == marked(encode_one({"messages": THREE_TURNS}, CHAT), CHAT)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row_and_a_solution():
    turns = [dict(turn) for turn in THREE_TURNS]
    turns[1]["content"] = "<think>Hm.</think>Nobody knows."
    with pytest.raises(
        DataError,
        match=r"rows, row 1 \(counted from 0\): .* 0 to 1 .*todi-offline\[trl\].*--chat-template.*one answer",
    ):
        encode([{"messages": THREE_TURNS}, {"messages": turns}], chat_tokenizer(DROPS_EARLIER_THOUGHTS))


def test_a_template_that_rewrites_earlier_turns_works_for_rows_with_one_answer():
    tokenizer = chat_tokenizer(DROPS_EARLIER_THOUGHTS)
    turns = [dict(turn) for turn in THREE_TURNS]
    turns[1]["content"] = "<think>Hm.</think>Nobody knows."
    text = marked(encode_one({"prompt": turns[:3], "completion": turns[3:]}, tokenizer), tokenizer)
    assert "think" not in text
    assert text.endswith("[Long ago.<|im_end|>]")


def test_text_after_the_last_message_does_not_become_part_of_earlier_turns():
    tokenizer = chat_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    tokenizer.eos_token = "<|endoftext|>"
    text = marked(encode_one({"messages": THREE_TURNS}, tokenizer), tokenizer)
    assert "[Nobody knows.<|im_end|>]\n<|im_start|>user" in text
    assert text.endswith("[Long ago.<|im_end|>]")


def test_eos_ends_a_conversation_if_the_template_writes_no_end_of_turn_token():
    tokenizer = chat_tokenizer(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert marked(encode_one({"messages": THREE_TURNS[:2]}, tokenizer), tokenizer) == (
        "user: Who wrote it?\nassistant: [Nobody knows.\n<|im_end|>]"
    )


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day():
    tokenizer = chat_tokenizer("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') + '\n' }}" + CHATML)
    assert marked(encode_one({"messages": THREE_TURNS}, tokenizer), tokenizer).startswith(
        "26 Jul 2024\n<|im_start|>user"
    )


def test_a_conversation_that_the_template_refuses_is_an_error_with_the_row():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"row 0 .*refuses its messages: roles must alternate"):
        encode({"messages": THREE_TURNS}, tokenizer)


def test_conversations_need_a_chat_template():
    with pytest.raises(ModelError, match=r"no chat template; name one \(--chat-template FILE\), take the tok"):
        encode({"messages": THREE_TURNS}, PLAIN)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ModelError, match=r"no EOS token.*set tokenizer.eos_token"):
        encode(ROWS, PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer))
