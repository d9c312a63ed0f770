"""The token ids and the supervised positions of every form of columns and every kind of tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import CHAT, PLAIN, ROWS, THREE_TURNS, encode, encode_one, like_sentencepiece, marked, with_bos
from support.tiny import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from todi_offline.data import (
    ALPACA,
    DataConfig,
    DataReport,
    load_examples,
)
from todi_offline.errors import ConfigError, DataError, ModelError

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
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "'labels' holds other ids than 'input_ids'"),
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


# Chat templates


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


# Cut and dropped rows


def test_a_prompt_that_is_too_long_keeps_bos_its_beginning_and_its_end():
    tokenizer = with_bos()
    prompt = "word " * 50 + "and then?\n"
    examples = encode({"prompt": prompt, "completion": "Yes."}, tokenizer, max_length=40, max_prompt_length=10)
    plain = PLAIN(prompt).input_ids
    assert examples[0].token_ids[:10].tolist() == [tokenizer.bos_token_id, *plain[:4], *plain[-5:]]
    assert marked(examples[0], tokenizer).endswith("[Yes.<|endoftext|>]")
    assert examples.report == DataReport(num_rows=1, num_examples=1, num_prompts_cut=1)


def test_a_chat_prompt_that_is_too_long_loses_the_middle_of_its_question_only():
    question = " ".join(str(number) for number in range(200))
    row = {"instruction": question, "output": "Yes."}
    examples = encode(row, CHAT, max_length=60, max_prompt_length=40)
    text = marked(examples[0], CHAT)
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]"
    assert text.startswith(head)
    assert text.endswith(f" 199{tail}")
    kept = text[len(head) : -len(tail)]
    half = (len(kept) + 1) // 2
    assert kept == question[:half] + question[len(question) - (len(kept) - half) :]
    assert 36 < len(CHAT(head + kept + "<|im_end|>\n<|im_start|>assistant\n").input_ids) <= 40
    assert examples.report.num_prompts_cut == 1


def test_a_prompt_as_messages_is_cut_in_its_last_message():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "so " * 200 + "why?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "No."}]}
    text = marked(encode_one(row, CHAT, max_length=60, max_prompt_length=40), CHAT)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("so why?<|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>]")


def test_a_prompt_whose_system_message_alone_is_too_long_is_dropped_and_counted():
    prompt = [{"role": "system", "content": "Be brief. " * 50}, {"role": "user", "content": "Why?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "No."}]}
    report = encode([row, {**row, "prompt": prompt[1:]}], CHAT, max_length=60, max_prompt_length=40).report
    assert (report.num_examples, report.num_prompt_too_long, report.num_dropped) == (1, 1, 1)


def test_a_response_is_cut_at_max_length_and_then_has_no_eos():
    examples = encode({"prompt": "Hi\n", "completion": "la " * 50}, max_length=20, max_prompt_length=10)
    assert examples.num_tokens.tolist() == [20]
    assert PLAIN.eos_token_id not in examples[0].token_ids
    assert examples.report.num_responses_cut == 1
    assert examples.report.num_prompts_cut == 0


def test_conversations_are_cut_only_at_max_length():
    row = {"messages": THREE_TURNS}
    whole = encode_one(row, CHAT)
    examples = encode(row, CHAT, max_length=30, max_prompt_length=3)
    np.testing.assert_array_equal(examples[0].token_ids, whole.token_ids[:30])
    np.testing.assert_array_equal(examples[0].target_mask, [*whole.target_mask[:29], False])
    assert (examples.report.num_responses_cut, examples.report.num_prompts_cut) == (1, 0)


def test_a_prompt_that_is_too_long_loses_its_oldest_turns_before_its_question():
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, *THREE_TURNS[:3]], "completion": THREE_TURNS[3:]}
    examples = encode(row, CHAT, max_length=60, max_prompt_length=44)
    assert marked(examples[0], CHAT) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n"
        "[Long ago.<|im_end|>]"
    )
    assert examples.report.num_prompts_cut == 1


def test_a_conversation_whose_first_question_fills_max_length_loses_the_middle_of_it():
    examples = encode({"messages": LONG_QUESTION}, CHAT, max_length=70)
    assert marked(examples[0], CHAT).endswith("so <|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>]")
    assert len(examples[0].token_ids) <= 70
    assert examples.report.num_prompts_cut == 1


def test_max_prompt_length_is_half_of_max_length_by_default():
    row = {"prompt": "word " * 400, "completion": "la " * 400}
    examples = encode(row, max_length=256)
    assert examples.recipe["max_prompt_length"] == 128
    assert int(examples[0].target_mask.argmax()) + 1 == 128
    assert examples.num_tokens.tolist() == [256]


def test_a_warning_with_counts_appears_if_over_one_percent_is_cut_or_dropped(caplog):
    rows = [{"text": "Once."}] * 99
    with caplog.at_level("WARNING"):
        encode([*rows, {"text": ""}])
        assert not caplog.records
        encode([*rows, {"text": ""}, {"text": " "}])
    (record,) = caplog.records
    assert "rows: 101 rows, 99 examples; 0 prompts and 0 responses cut; 2 dropped (2 empty" in record.getMessage()


# Long and short texts


@pytest.mark.parametrize("overlap", [0, 1, 7])
@pytest.mark.parametrize("tokenizer", [PLAIN, with_bos("<|im_start|> $A")], ids=["plain", "bos"])
def test_a_long_text_is_split_and_each_token_is_supervised_once(tokenizer, overlap):
    text = " ".join(str(number) for number in range(100))
    examples = encode({"id": "a", "text": text}, tokenizer, max_length=30, overlap=overlap)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    expected = [*PLAIN(text).input_ids, PLAIN.eos_token_id]
    read: list[int] = []
    num_supervised = 0
    for number, example in enumerate(examples):
        ids = example.token_ids.tolist()
        assert len(ids) <= 30
        assert ids[: len(start)] == start
        body, num_context = ids[len(start) :], overlap if number else 0
        assert body[:num_context] == read[len(read) - num_context :]
        read += body[num_context:]
        num_supervised += int(example.target_mask.sum())
    assert read == expected
    num_unpredicted = (not start) + (0 if overlap else len(examples) - 1)  # no token stands before them
    assert num_supervised == len(expected) - num_unpredicted
    assert [example.id for example in examples] == [f"a#{number}" for number in range(1, len(examples) + 1)]
    assert (examples.report.num_rows, examples.report.num_texts_split, examples.report.num_responses_cut) == (1, 1, 0)


def test_short_texts_are_packed_and_the_first_token_of_each_is_not_supervised():
    rows = [{"text": f"Story {number}."} for number in range(40)]
    examples = encode(rows, max_length=64, pack=True)
    whole = [token for row in rows for token in [*PLAIN(row["text"]).input_ids, PLAIN.eos_token_id]]
    assert [token for example in examples for token in example.token_ids.tolist()] == whole
    assert len(examples) < 8
    for example in examples:
        ends = example.token_ids[:-1] == PLAIN.eos_token_id
        np.testing.assert_array_equal(example.target_mask[:-1], ~ends)
    with pytest.raises(ConfigError, match="pack works only for rows of `text`, and rows has prompt"):
        encode(ROWS, pack=True)


BLANK_ANSWER = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}]
LONG_QUESTION = [{"role": "user", "content": "so " * 99}, {"role": "assistant", "content": "No."}]
LONG_SYSTEM = [{"role": "system", "content": "so " * 99}, *THREE_TURNS]


@pytest.mark.parametrize(
    ("row", "good", "reason"),
    [
        ({"prompt": "Hi", "completion": " \n"}, ROWS[0], "num_empty"),
        ({"instruction": "Hi", "output": ""}, {"instruction": "Hi", "output": "Hello."}, "num_empty"),
        ({"text": ""}, {"text": "Once."}, "num_empty"),
        ({"messages": THREE_TURNS + BLANK_ANSWER}, {"messages": THREE_TURNS}, "num_empty"),
        ({"messages": []}, {"messages": THREE_TURNS}, "num_unsupervised"),
        ({"messages": THREE_TURNS[:1]}, {"messages": THREE_TURNS}, "num_unsupervised"),
        ({"messages": LONG_SYSTEM}, {"messages": THREE_TURNS}, "num_prompt_too_long"),
    ],
)
def test_rows_without_a_supervised_token_are_dropped_and_counted_by_reason(row, good, reason):
    examples = encode([row, good, row], CHAT, max_length=70, max_prompt_length=20)
    report = examples.report
    assert (report.num_rows, report.num_examples, report.num_dropped, getattr(report, reason)) == (3, 1, 2, 2)
    assert examples[0].id == "rows:1"


def test_a_data_set_without_examples_is_an_error_with_the_reasons():
    with pytest.raises(DataError, match=r"rows gives no example: 2 rows, 0 examples; .* 2 dropped \(2 empty"):
        encode([{"text": ""}, {"text": " "}])


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
