"""The token ids and the supervised positions of every form of columns and every kind of tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import CHAT, PLAIN, ROWS, THREE_TURNS, encode, encode_one, like_sentencepiece, marked, with_bos
from support.tiny import tiny_tokenizer

from todi_offline.data import ALPACA, DataConfig, load_examples
from todi_offline.errors import DataError

# The boundary between prompt and response


@settings(derandomize=True, deadline=None, max_examples=100)
@given(prompt=st.text(min_size=1, max_size=40), response=st.text(min_size=1, max_size=40).filter(str.strip))
def test_the_prompt_equals_the_prompt_at_inference_and_the_response_and_eos_are_supervised(prompt, response):
    example = encode_one({"prompt": prompt, "completion": response})
    num_prompt = len(PLAIN(prompt).input_ids)
    assert example.token_ids[:num_prompt].tolist() == PLAIN(prompt).input_ids
    assert example.token_ids[num_prompt:].tolist() == [*PLAIN(response).input_ids, PLAIN.eos_token_id]
    assert np.flatnonzero(example.target_mask).tolist() == list(range(num_prompt - 1, len(example.token_ids) - 1))


def test_no_token_crosses_the_boundary_of_prompt_and_response():
    joint = PLAIN("the functi" + "on").input_ids
    example = encode_one({"prompt": "the functi", "completion": "on"})
    assert example.token_ids[:-1].tolist() == PLAIN("the functi").input_ids + PLAIN("on").input_ids != joint


def test_bos_is_only_at_the_start_and_eos_only_at_the_end():
    tokenizer = with_bos()
    for prompt in ("Say hello.\n", "<|im_start|>Say hello.\n"):
        example = encode_one({"prompt": prompt, "completion": "Hello."}, tokenizer)
        assert marked(example, tokenizer) == "<|im_start|>Say hello.\n[Hello.<|endoftext|>]"


def test_a_response_that_ends_in_eos_gets_no_second_eos():
    example = encode_one({"prompt": "Hi\n", "completion": "Hello.<|endoftext|>"})
    assert marked(example, PLAIN) == "Hi\n[Hello.<|endoftext|>]"


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_response_gets_no_leading_space_from_the_tokenizer(scheme):
    tokenizer = like_sentencepiece(scheme)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Four").input_ids)[0].startswith("▁")
    example = encode_one(ROWS[0], tokenizer)
    assert tokenizer.decode(example.token_ids.tolist()) == ROWS[0]["prompt"] + ROWS[0]["completion"] + "</s>"


def test_a_second_tokenizer_never_gets_the_tokens_of_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    small, large = tiny_tokenizer(chat=False), tiny_tokenizer(chat=False, vocab_size=2048)
    for tokenizer in (small, large, small):
        (example,) = load_examples(DataConfig(data=str(path)), tokenizer)
        assert tokenizer.decode(example.token_ids.tolist()) == "What is 2 + 2?\nFour, of course.<|endoftext|>"


# The forms


def test_an_instruction_without_a_chat_template_uses_the_alpaca_prompt():
    example = encode_one({"instruction": "Greet.", "output": "Hello."})
    assert marked(example, PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\n[Hello.<|endoftext|>]"
    )


def test_an_instruction_with_an_input_uses_the_alpaca_prompt_with_an_input():
    example = encode_one({"instruction": "Greet {her}.", "input": "Ada", "response": "Hello."})
    assert marked(example, PLAIN) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet {her}.\n\n### Input:\nAda\n\n### Response:\n[Hello.<|endoftext|>]"
    )


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}])
def test_an_absent_null_or_empty_input_counts_as_no_input(absent):
    example = encode_one({"instruction": "Greet.", "output": "Hello.", **absent})
    assert marked(example, PLAIN).startswith(ALPACA.format(instruction="Greet."))


def test_with_a_chat_template_an_instruction_and_its_input_become_the_users_turn():
    example = encode_one({"instruction": "Greet.", "input": "Ada", "output": "Hello."}, CHAT)
    assert marked(example, CHAT) == (
        "<|im_start|>user\nGreet.\n\nAda<|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>]"
    )


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_a_ready_made_prompt_beside_an_instruction_is_used_as_it_is(tokenizer):
    row = {"instruction": "Greet.", "input": "Ada", "prompt": "Q: Greet.\nA: ", "output": "Hello."}
    examples = encode(row, tokenizer)
    assert marked(examples[0], tokenizer) == f"Q: Greet.\nA: [Hello.{tokenizer.eos_token}]"
    assert examples.recipe["template"] is None


def test_only_assistant_turns_are_supervised_with_their_end_of_turn_token():
    assert marked(encode_one({"messages": THREE_TURNS}, CHAT), CHAT) == (
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n[Nobody knows.<|im_end|>]\n"
        "<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n[Long ago.<|im_end|>]"
    )


def test_a_conversation_is_tokenised_as_its_template_renders_it():
    rendered = CHAT.apply_chat_template(THREE_TURNS, tokenize=False)
    example = encode_one({"messages": THREE_TURNS}, CHAT)
    assert example.token_ids.tolist() == CHAT(rendered.rstrip("\n")).input_ids


def test_messages_after_the_last_answer_are_left_out():
    whole = encode_one({"messages": THREE_TURNS}, CHAT)
    asked = encode_one({"messages": [*THREE_TURNS, {"role": "user", "content": "Thanks."}]}, CHAT)
    np.testing.assert_array_equal(asked.token_ids, whole.token_ids)
    np.testing.assert_array_equal(asked.target_mask, whole.target_mask)


def test_null_keys_of_a_message_are_ignored():
    turns = [{**turn, "tool_calls": None, "name": None} for turn in THREE_TURNS]
    assert encode_one({"messages": turns}, CHAT).token_ids.tolist() == (
        encode_one({"messages": THREE_TURNS}, CHAT).token_ids.tolist()
    )


def test_only_the_completion_is_supervised_if_prompt_and_completion_are_messages():
    example = encode_one({"prompt": THREE_TURNS[:3], "completion": THREE_TURNS[3:]}, CHAT)
    assert marked(example, CHAT) == (
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\nNobody knows.<|im_end|>\n"
        "<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n[Long ago.<|im_end|>]"
    )


def test_every_token_of_a_text_is_supervised():
    example = encode_one({"text": "Once upon a time."})
    assert example.token_ids.tolist() == [*PLAIN("Once upon a time.").input_ids, PLAIN.eos_token_id]
    assert example.target_mask.tolist() == [True] * (len(example.token_ids) - 1) + [False]
    assert marked(encode_one({"text": "Once."}, with_bos()), PLAIN) == "<|im_start|>[Once.<|endoftext|>]"


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ({"messages", "prompt", "completion", "instruction", "output", "text"}, "messages"),
        ({"prompt", "completion", "instruction", "output", "text"}, "prompt + completion"),
        ({"prompt", "instruction", "output", "response", "text"}, "instruction + output"),
        ({"instruction", "response", "text"}, "instruction + response"),
        ({"text", "prompt", "output", "label"}, "text"),
    ],
)
def test_the_first_form_that_fits_the_columns_is_used_and_other_columns_are_ignored(columns, form):
    row = {column: THREE_TURNS if column == "messages" else "Some words." for column in columns}
    assert encode(row, CHAT).recipe["form"] == form


@pytest.mark.parametrize(
    ("mask", "supervised"),
    [
        ({}, "a[bcdef]"),
        ({"completion_mask": [0, 0, 0, 1, 1, 1]}, "abc[def]"),
        ({"assistant_masks": [0, 1, 1, 0, 0, 1]}, "a[bc]de[f]"),
        ({"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [0, 1, 1, 1, 0, 0]}, "ab[cd]"),
        ({"labels": "ids"}, "ab[cdef]"),
    ],
)
def test_rows_of_token_ids_have_their_own_mask(mask, supervised):
    ids = PLAIN.convert_tokens_to_ids(list("abcdef"))
    row = {"input_ids": ids, "text": "never read", **mask}
    if "labels" in mask:
        row["labels"] = [-100, -100, *ids[2:]]
    example = encode_one(row)
    assert marked(example, PLAIN).startswith(supervised)
    assert example.token_ids.tolist() == ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": "abc"}, "column 'input_ids' holds 'abc' .*expected a list of integers"),
        ({"input_ids": [1, 512]}, "holds the id 512; the tokenizer knows 0 to 511"),
        ({"input_ids": [1, 2], "labels": [1]}, "column 'labels' has 1 entries for 2 of 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "'labels' differs from 'input_ids'"),
    ],
)
def test_wrong_tokens_and_masks_are_named(row, message):
    with pytest.raises(DataError, match=message):
        encode([{"input_ids": [1, 2]}, row])


def test_the_first_of_several_references_is_the_response():
    for row in (
        {"instruction": "Greet.", "output": ["Hello.", "Hi."]},
        {"instruction": "Greet.", "response": ["Hello."]},
        {"prompt": "Greet: ", "completion": ["Hello.", "Hi."]},
    ):
        assert marked(encode_one(row), PLAIN).endswith("[Hello.<|endoftext|>]")


def test_columns_that_fit_no_form_are_refused_with_a_list_of_the_forms():
    with pytest.raises(DataError, match=r"rows has the columns question, answer; expected messages, or prompt and"):
        encode({"question": "Why?", "answer": "Because."})


# Wrong values


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "output": 7}, r"column 'output' holds 7 \(int\); expected a text"),
        ({"instruction": None, "output": "x"}, r"column 'instruction' holds None \(NoneType\)"),
        ({"instruction": "Hi", "input": 3.5, "output": "x"}, r"column 'input' holds 3.5 \(float\)"),
        ({"instruction": "Hi"}, "column 'output' is missing, though the first row has it"),
        ({"instruction": "Hi", "output": "\ud83d"}, "column 'output' is not valid Unicode"),
        (["Hi", "x"], "the row is a list; expected columns with their values"),
    ],
)
def test_a_wrong_value_is_named_with_its_row_and_column(row, message):
    with pytest.raises(DataError, match=rf"rows, row 1 \(counted from 0\): {message}"):
        encode([{"instruction": "Hi", "output": "Hello."}, row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, "completion": "x"}, "column 'prompt' holds None"),
        ({"completion": "x"}, "column 'prompt' is missing"),
        ({"prompt": "x", "completion": THREE_TURNS[1:2]}, r"column 'completion' holds \[\{'role': .* \(list\)"),
        ({"prompt": THREE_TURNS[:1], "completion": "x"}, "column 'completion' holds 'x' .*expected a list of messages"),
    ],
)
def test_prompt_and_completion_must_both_be_texts_or_both_messages(row, message):
    with pytest.raises(DataError, match=message):
        encode([ROWS[0], row], CHAT)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"column 'messages' holds 'Hello' \(str\); expected a list of messages"),
        (["Hello"], r"messages\[0\] is a str; expected an object with role and content"),
        ([{"role": "human", "content": "Hi"}], r"messages\[0\] has the role 'human'; expected one of .*assistant"),
        ([{"role": "tool", "content": {"a": 1}}], r"the content of messages\[0\] holds \{'a': 1\}"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}],
            r"messages\[0\] has the tool calls \[\{\}\]",
        ),
        ([{"role": "user", "content": None}], r"the content of messages\[0\] holds None"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"the content of messages\[0\] holds \[\{'type'"),
        (THREE_TURNS[1:], "the first message is the assistant's"),
    ],
)
def test_an_invalid_message_is_named_with_its_row(messages, message):
    with pytest.raises(DataError, match=rf"row 1 .*: {message}"):
        encode([{"messages": THREE_TURNS}, {"messages": messages}], CHAT)


def test_tools_that_the_template_ignores_are_refused():
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    for row, message in (
        ({"messages": THREE_TURNS, "tools": [{"name": "clock"}]}, "the chat template leaves out tools"),
        ({"messages": [*THREE_TURNS[:1], calling]}, "the chat template leaves out tool calls"),
    ):
        with pytest.raises(DataError, match=message):
            encode(row, CHAT)


def test_an_empty_data_set_and_rows_without_columns_are_refused():
    with pytest.raises(DataError, match="rows has no rows"):
        encode([])
    with pytest.raises(DataError, match="row 0 of rows is a str; expected columns"):
        encode(["Hello"])
