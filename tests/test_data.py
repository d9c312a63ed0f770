"""What the teacher reads and what is supervised, for every form, kind of file and kind of tokenizer."""

import csv
import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from todi_offline.data import (
    ALPACA,
    ALPACA_WITH_INPUT,
    DataConfig,
    DataReport,
    Example,
    Examples,
    examples,
    examples_from_rows,
    load_examples,
)
from todi_offline.errors import ConfigError, DataError, ModelError

PLAIN = tiny_tokenizer(chat=False)
CHAT = tiny_tokenizer(chat=True)

ROWS = [
    {"prompt": "What is 2 + 2?\n", "completion": "Four, of course."},
    {"prompt": "Sum up, in a word:\n", "completion": 'It is "good",\nreally.'},
    {"prompt": "Naïve café?\n", "completion": "Ça va — 東京."},
]

THREE_TURNS = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Nobody knows."},
    {"role": "user", "content": "And when?"},
    {"role": "assistant", "content": "Long ago."},
]


def encode(rows, tokenizer=PLAIN, **settings):
    rows = rows if isinstance(rows, list) else [rows]
    return examples_from_rows(rows, DataConfig(**settings), tokenizer)


def encode_one(row, tokenizer=PLAIN, **settings):
    (example,) = encode(row, tokenizer, **settings)
    return example


def marked(example, tokenizer):
    """Return the text with what is supervised in brackets."""
    supervised = [False, *example.target_mask[:-1].tolist()]
    text, inside = "", False
    pieces: list[list[int]] = [[]]
    flags = []
    for token, flag in zip(example.token_ids.tolist(), supervised, strict=True):
        if flag != inside:
            flags.append(inside)
            pieces.append([])
            inside = flag
        pieces[-1].append(token)
    flags.append(inside)
    for piece, flag in zip(pieces, flags, strict=True):
        decoded = tokenizer.decode(piece)
        text += f"[{decoded}]" if flag else decoded
    return text


def with_bos(single="<|im_start|> $A <|endoftext|>"):
    """A tokenizer that puts BOS before a text and, as some do, EOS after it."""
    tokenizer = tiny_tokenizer(chat=False)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def like_sentencepiece(scheme="always"):
    """A tokenizer that puts a space before whatever it is given, as that of Llama 2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({character for row in ROWS for text in row.values() for character in text})
    tokenizer.train_from_iterator(
        ["Four of course", "What is it in a word?"],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


# The boundary


@settings(derandomize=True, deadline=None, max_examples=100)
@given(prompt=st.text(min_size=1, max_size=40), response=st.text(min_size=1, max_size=40).filter(str.strip))
def test_the_prompt_is_what_inference_reads_and_the_response_and_eos_are_supervised(prompt, response):
    example = encode_one({"prompt": prompt, "completion": response})
    num_prompt = len(PLAIN(prompt).input_ids)
    assert example.token_ids[:num_prompt].tolist() == PLAIN(prompt).input_ids
    assert example.token_ids[num_prompt:].tolist() == [*PLAIN(response).input_ids, PLAIN.eos_token_id]
    assert np.flatnonzero(example.target_mask).tolist() == list(range(num_prompt - 1, len(example.token_ids) - 1))


def test_a_boundary_that_a_tokenizer_would_merge_across_stays_a_boundary():
    joint = PLAIN("the functi" + "on").input_ids
    example = encode_one({"prompt": "the functi", "completion": "on"})
    assert example.token_ids[:-1].tolist() == PLAIN("the functi").input_ids + PLAIN("on").input_ids != joint


def test_bos_stands_once_at_the_start_and_eos_only_at_the_end():
    tokenizer = with_bos()
    for prompt in ("Say hello.\n", "<|im_start|>Say hello.\n"):
        example = encode_one({"prompt": prompt, "completion": "Hello."}, tokenizer)
        assert marked(example, tokenizer) == "<|im_start|>Say hello.\n[Hello.<|endoftext|>]"


def test_eos_is_not_doubled_where_the_response_has_it():
    example = encode_one({"prompt": "Hi\n", "completion": "Hello.<|endoftext|>"})
    assert marked(example, PLAIN) == "Hi\n[Hello.<|endoftext|>]"


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_response_gets_no_space_that_the_tokenizer_puts_before_a_text(scheme):
    tokenizer = like_sentencepiece(scheme)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Four").input_ids)[0].startswith("▁")
    example = encode_one(ROWS[0], tokenizer)
    assert tokenizer.decode(example.token_ids.tolist()) == ROWS[0]["prompt"] + ROWS[0]["completion"] + "</s>"


def test_another_tokenizer_is_never_served_the_tokens_of_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    small, large = tiny_tokenizer(chat=False), tiny_tokenizer(chat=False, vocab_size=2048)
    for tokenizer in (small, large, small):
        (example,) = load_examples(DataConfig(data=str(path)), tokenizer)
        assert tokenizer.decode(example.token_ids.tolist()) == "What is 2 + 2?\nFour, of course.<|endoftext|>"


# The forms


def test_an_instruction_without_a_chat_template_is_asked_in_alpacas_words():
    example = encode_one({"instruction": "Greet.", "output": "Hello."})
    assert marked(example, PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\n[Hello.<|endoftext|>]"
    )


def test_an_input_gets_a_place_of_its_own_in_alpacas_words():
    example = encode_one({"instruction": "Greet {her}.", "input": "Ada", "response": "Hello."})
    assert marked(example, PLAIN) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet {her}.\n\n### Input:\nAda\n\n### Response:\n[Hello.<|endoftext|>]"
    )


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}])
def test_an_input_that_is_absent_null_or_empty_is_no_input(absent):
    example = encode_one({"instruction": "Greet.", "output": "Hello.", **absent})
    assert marked(example, PLAIN).startswith(ALPACA.format(instruction="Greet."))


def test_an_instruction_and_its_input_become_the_users_turn_where_there_is_a_chat_template():
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


def test_every_assistant_turn_is_supervised_with_its_end_of_turn_and_nothing_else():
    assert marked(encode_one({"messages": THREE_TURNS}, CHAT), CHAT) == (
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n[Nobody knows.<|im_end|>]\n"
        "<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n[Long ago.<|im_end|>]"
    )


def test_a_conversation_is_tokenised_as_its_template_renders_it():
    rendered = CHAT.apply_chat_template(THREE_TURNS, tokenize=False)
    example = encode_one({"messages": THREE_TURNS}, CHAT)
    assert example.token_ids.tolist() == CHAT(rendered.rstrip("\n")).input_ids


def test_what_follows_the_last_answer_is_left_out():
    whole = encode_one({"messages": THREE_TURNS}, CHAT)
    asked = encode_one({"messages": [*THREE_TURNS, {"role": "user", "content": "Thanks."}]}, CHAT)
    np.testing.assert_array_equal(asked.token_ids, whole.token_ids)
    np.testing.assert_array_equal(asked.target_mask, whole.target_mask)


def test_keys_of_a_message_that_are_null_are_as_good_as_absent():
    turns = [{**turn, "tool_calls": None, "name": None} for turn in THREE_TURNS]
    assert encode_one({"messages": turns}, CHAT).token_ids.tolist() == (
        encode_one({"messages": THREE_TURNS}, CHAT).token_ids.tolist()
    )


def test_of_prompt_and_completion_as_messages_only_the_completion_is_supervised():
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
def test_the_most_specific_form_that_the_columns_have_is_taken_and_others_are_ignored(columns, form):
    row = {column: THREE_TURNS if column == "messages" else "Some words." for column in columns}
    assert encode(row, CHAT).recipe["form"] == form


def test_columns_of_no_form_are_listed_with_the_forms_that_there_are():
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
# As Qwen 3 does: thoughts are left out of all turns but the last.
FORGETFUL = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
MARKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] INSIDE }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ AFTER }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_system_prompt_that_a_template_adds_by_default_is_read_and_not_supervised():
    tokenizer = chat_tokenizer(WITH_DEFAULT_SYSTEM)
    text = marked(encode_one({"messages": THREE_TURNS}, tokenizer), tokenizer)
    assert text.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWho wrote it?")
    assert text.count("[") == 2
    assert "[Long ago.<|im_end|>]" in text


def test_generation_blocks_give_the_same_as_telling_turns_apart():
    inside = MARKING.replace("INSIDE", "+ '<|im_end|>'").replace(
        "AFTER", "'\n' if message['role'] == 'assistant' else '<|im_end|>\n'"
    )
    example = encode_one({"messages": THREE_TURNS}, chat_tokenizer(inside))
    expected = encode_one({"messages": THREE_TURNS}, CHAT)
    np.testing.assert_array_equal(example.token_ids, expected.token_ids)
    np.testing.assert_array_equal(example.target_mask, expected.target_mask)


def test_an_end_of_turn_outside_the_generation_block_is_supervised_all_the_same():
    tokenizer = chat_tokenizer(MARKING.replace("INSIDE", "").replace("AFTER", "'<|im_end|>\n'"))
    example = encode_one({"messages": THREE_TURNS}, tokenizer)
    assert marked(example, tokenizer) == marked(encode_one({"messages": THREE_TURNS}, CHAT), CHAT)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row_and_a_way_out():
    turns = [dict(turn) for turn in THREE_TURNS]
    turns[1]["content"] = "<think>Hm.</think>Nobody knows."
    with pytest.raises(
        DataError, match=r"rows, row 1 \(counted from 0\): .* messages 0 to 1 .*generation.* one answer"
    ):
        encode([{"messages": THREE_TURNS}, {"messages": turns}], chat_tokenizer(FORGETFUL))


def test_a_template_that_rewrites_earlier_turns_serves_rows_of_one_answer():
    tokenizer = chat_tokenizer(FORGETFUL)
    turns = [dict(turn) for turn in THREE_TURNS]
    turns[1]["content"] = "<think>Hm.</think>Nobody knows."
    text = marked(encode_one({"prompt": turns[:3], "completion": turns[3:]}, tokenizer), tokenizer)
    assert "think" not in text
    assert text.endswith("[Long ago.<|im_end|>]")


def test_what_a_template_writes_after_the_last_message_of_all_is_no_part_of_earlier_turns():
    tokenizer = chat_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    tokenizer.eos_token = "<|endoftext|>"
    text = marked(encode_one({"messages": THREE_TURNS}, tokenizer), tokenizer)
    assert "[Nobody knows.<|im_end|>]\n<|im_start|>user" in text
    assert text.endswith("[Long ago.<|im_end|>\n<|endoftext|>]")


def test_eos_ends_a_conversation_whose_template_ends_no_turn():
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


def test_what_a_template_refuses_is_an_error_that_names_the_row():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"row 0 .*refuses its messages: roles must alternate"):
        encode({"messages": THREE_TURNS}, tokenizer)


def test_conversations_need_a_chat_template():
    with pytest.raises(ModelError, match=r"no chat template; take the tokenizer of an instruct model"):
        encode({"messages": THREE_TURNS}, PLAIN)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ModelError, match=r"no EOS token.*set tokenizer.eos_token"):
        encode(ROWS, PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer))


# What is cut and what is dropped


def test_too_long_a_prompt_keeps_bos_and_its_end():
    tokenizer = with_bos()
    prompt = "word " * 50 + "and then?\n"
    examples = encode({"prompt": prompt, "completion": "Yes."}, tokenizer, max_length=40, max_prompt_length=10)
    plain = PLAIN(prompt).input_ids
    assert examples[0].token_ids[:10].tolist() == [tokenizer.bos_token_id, *plain[-9:]]
    assert marked(examples[0], tokenizer).endswith("[Yes.<|endoftext|>]")
    assert examples.report == DataReport(num_rows=1, num_examples=1, num_prompts_cut=1)


def test_too_long_a_chat_prompt_loses_the_beginning_of_its_question_and_nothing_of_the_template():
    question = " ".join(str(number) for number in range(200))
    row = {"instruction": question, "output": "Yes."}
    examples = encode(row, CHAT, max_length=60, max_prompt_length=40)
    text = marked(examples[0], CHAT)
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]"
    assert text.startswith(head)
    assert text.endswith(f" 199{tail}")
    kept = text[len(head) : -len(tail)]
    assert question.endswith(kept)
    one_more = head + question[-len(kept) - 1 :] + "<|im_end|>\n<|im_start|>assistant\n"
    assert (
        len(CHAT(head + kept + "<|im_end|>\n<|im_start|>assistant\n").input_ids) <= 40 < len(CHAT(one_more).input_ids)
    )
    assert examples.report.num_prompts_cut == 1


def test_a_prompt_as_messages_is_cut_in_its_last_message():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "so " * 200 + "why?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "No."}]}
    text = marked(encode_one(row, CHAT, max_length=60, max_prompt_length=40), CHAT)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("so why?<|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>]")


def test_a_prompt_that_is_too_long_before_its_last_message_is_dropped_and_counted():
    prompt = [{"role": "system", "content": "Be brief. " * 50}, {"role": "user", "content": "Why?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "No."}]}
    report = encode([row, {**row, "prompt": prompt[1:]}], CHAT, max_length=60, max_prompt_length=40).report
    assert (report.num_examples, report.num_prompt_too_long, report.num_dropped) == (1, 1, 1)


def test_a_response_is_cut_at_the_whole_length_and_then_has_no_eos():
    examples = encode({"prompt": "Hi\n", "completion": "la " * 50}, max_length=20, max_prompt_length=10)
    assert examples.num_tokens.tolist() == [20]
    assert PLAIN.eos_token_id not in examples[0].token_ids
    assert examples.report.num_responses_cut == 1
    assert examples.report.num_prompts_cut == 0


@pytest.mark.parametrize("row", [{"text": "la " * 90}, {"messages": THREE_TURNS}])
def test_texts_and_conversations_are_cut_at_the_whole_length_alone(row):
    whole = encode_one(row, CHAT)
    examples = encode(row, CHAT, max_length=30, max_prompt_length=3)
    np.testing.assert_array_equal(examples[0].token_ids, whole.token_ids[:30])
    np.testing.assert_array_equal(examples[0].target_mask, [*whole.target_mask[:29], False])
    assert (examples.report.num_responses_cut, examples.report.num_prompts_cut) == (1, 0)


BLANK_ANSWER = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}]
LONG_QUESTION = [{"role": "user", "content": "so " * 99}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("row", "good", "reason"),
    [
        ({"prompt": "Hi", "completion": " \n"}, ROWS[0], "num_empty"),
        ({"instruction": "Hi", "output": ""}, {"instruction": "Hi", "output": "Hello."}, "num_empty"),
        ({"text": ""}, {"text": "Once."}, "num_empty"),
        ({"messages": THREE_TURNS + BLANK_ANSWER}, {"messages": THREE_TURNS}, "num_empty"),
        ({"messages": []}, {"messages": THREE_TURNS}, "num_unsupervised"),
        ({"messages": THREE_TURNS[:1]}, {"messages": THREE_TURNS}, "num_unsupervised"),
        ({"messages": LONG_QUESTION}, {"messages": THREE_TURNS}, "num_unsupervised"),
    ],
)
def test_rows_without_anything_to_learn_are_dropped_and_counted_by_reason(row, good, reason):
    examples = encode([row, good, row], CHAT, max_length=70, max_prompt_length=20)
    report = examples.report
    assert (report.num_rows, report.num_examples, report.num_dropped, getattr(report, reason)) == (3, 1, 2, 2)
    assert examples[0].id == "rows:1"


def test_a_data_set_that_gives_no_example_is_an_error_that_says_why():
    with pytest.raises(DataError, match=r"rows gives no example: 2 rows, 0 examples; .* 2 dropped \(2 empty"):
        encode([{"text": ""}, {"text": " "}])


# Wrong values


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "output": 7}, r"column 'output' holds 7 \(int\); expected a text"),
        ({"instruction": None, "output": "x"}, r"column 'instruction' holds None \(NoneType\)"),
        ({"instruction": "Hi", "input": 3.5, "output": "x"}, r"column 'input' holds 3.5 \(float\)"),
        ({"instruction": "Hi"}, "it has no column 'output', which the first row has"),
        ({"instruction": "Hi", "output": "\ud83d"}, "column 'output' holds half a character"),
        (["Hi", "x"], "it is a list; expected columns with their values"),
    ],
)
def test_a_wrong_value_is_named_with_its_row_and_column(row, message):
    with pytest.raises(DataError, match=rf"rows, row 1 \(counted from 0\): {message}"):
        encode([{"instruction": "Hi", "output": "Hello."}, row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, "completion": "x"}, "column 'prompt' holds None"),
        ({"completion": "x"}, "it has no column 'prompt'"),
        ({"prompt": "x", "completion": THREE_TURNS[1:2]}, r"column 'completion' holds \[\{'role': .* \(list\)"),
        ({"prompt": THREE_TURNS[:1], "completion": "x"}, "column 'completion' holds 'x' .*expected a list of messages"),
    ],
)
def test_prompt_and_completion_are_of_one_kind(row, message):
    with pytest.raises(DataError, match=message):
        encode([ROWS[0], row], CHAT)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"column 'messages' holds 'Hello' \(str\); expected a list of messages"),
        (["Hello"], r"messages\[0\] is a str; expected an object with role and content"),
        ([{"role": "human", "content": "Hi"}], r"messages\[0\] has the role 'human'; expected a text by .*assistant"),
        ([{"role": "tool", "content": "Hi"}], r"messages\[0\] has the role 'tool'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"messages\[0\] has tool calls; .*such rows out"),
        ([{"role": "user", "content": None}], r"the content of messages\[0\] holds None"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"the content of messages\[0\] holds \[\{'type'"),
        (THREE_TURNS[1:], "its first message is the assistant's"),
    ],
)
def test_what_is_no_conversation_of_texts_is_named(messages, message):
    with pytest.raises(DataError, match=rf"row 1 .*: {message}"):
        encode([{"messages": THREE_TURNS}, {"messages": messages}], CHAT)


def test_tools_are_refused():
    with pytest.raises(DataError, match="it has tools, which are not supported"):
        encode({"messages": THREE_TURNS, "tools": [{"name": "clock"}]}, CHAT)


def test_no_rows_and_rows_that_are_none_are_refused():
    with pytest.raises(DataError, match="rows has no rows"):
        encode([])
    with pytest.raises(DataError, match="row 0 of rows is a str; expected columns"):
        encode(["Hello"])


# Where rows come from


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8-sig")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, rows, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": lambda path, rows: path.write_text(" \n" + json.dumps(rows, indent=1)),
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "rows.arrow": write_arrow,
    "stream.arrow": lambda path, rows: write_arrow(path, rows, pa.ipc.new_stream),
    "ROWS.JSONL": write_jsonl,
    "folder": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_examples(name, tmp_path):
    WRITERS[name](tmp_path / name, ROWS)
    examples = load_examples(DataConfig(data=str(tmp_path / name)), PLAIN)
    assert [marked(example, PLAIN) for example in examples] == [marked(example, PLAIN) for example in encode(ROWS)]
    assert [example.id for example in examples] == [f"{name}:0", f"{name}:1", f"{name}:2"]
    assert {example.source for example in examples} == {name}
    assert examples.recipe["source"] == name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "folder"])
def test_conversations_come_through_every_kind_of_file_that_can_nest(name, tmp_path):
    rows = [{"messages": THREE_TURNS}, {"messages": [{"role": "system", "content": "Hm."}, *THREE_TURNS]}]
    WRITERS[name](tmp_path / name, rows)
    examples = load_examples(DataConfig(data=str(tmp_path / name)), CHAT)
    assert [marked(example, CHAT) for example in examples] == [marked(example, CHAT) for example in encode(rows, CHAT)]


def test_a_csv_file_holds_texts_whatever_they_look_like(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,input,output\n2 + 2,,4\nNo?,NA,null\n" + "x,y," + "z" * 200_000)
    first, second, third = load_examples(DataConfig(data=str(tmp_path / "rows.csv")), PLAIN)
    assert marked(first, PLAIN) == ALPACA.format(instruction="2 + 2") + "[4<|endoftext|>]"
    assert marked(second, PLAIN) == ALPACA_WITH_INPUT.format(instruction="No?", input="NA") + "[null<|endoftext|>]"
    assert len(third.token_ids) == 1024


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text": "b"\n',
            r"line 2 is not valid JSON \(.*\); expected one object a line",
        ),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', r"row 1 .*: it is a list; expected columns"),
        ("rows.jsonl", b'{"text": "\xff"}\n', r"cannot be read: .*utf-8"),
        ("rows.json", b'[{"text": "a"},', "cannot be read: .*line 1"),
        ("rows.json", b'{\n "data": []\n}', "line 1 is not valid JSON"),
        ("rows.jsonl", b"", "rows.jsonl has no rows"),
        ("rows.json", b"[]", "rows.json has no rows"),
        ("rows.csv", b"", "rows.csv has no rows"),
        ("rows.csv", b"text,more\na,b,c\n", "the row that ends in line 2 has not as many fields as the header"),
        ("rows.csv", b"text,more\na\n", "the row that ends in line 2 has not as many fields as the header"),
        ("rows.parquet", b"nonsense", "cannot be read"),
        ("rows.arrow", b"nonsense, too", "cannot be read"),
        ("rows.arrow", b"", "cannot be read"),
        ("rows.txt", b"Hello", r"rows.txt is of no known kind; expected one of .jsonl, .json, .csv, .parquet, .arrow"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(DataConfig(data=str(tmp_path / name)), PLAIN)


@pytest.mark.parametrize("name", ["/no/such/file.jsonl", "no/such/folder/at/all", "./nowhere", "file.CSV", "a b"])
def test_what_is_not_there_is_named(name):
    with pytest.raises(DataError, match=f"there is no file or folder {name}; expected one, a hub id, or stdlib"):
        load_examples(DataConfig(data=name), PLAIN)


def test_a_folder_that_was_not_saved_by_datasets_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is not a folder that `datasets` saved .*name a file within it"):
        load_examples(DataConfig(data=str(tmp_path)), PLAIN)


@pytest.fixture
def splits(tmp_path):
    """A folder with two splits, one row in the one and two in the other."""
    folder = tmp_path / "saved"
    parts = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_train_is_the_split_unless_another_is_named(splits):
    assert len(load_examples(DataConfig(data=str(splits)), PLAIN)) == 1
    examples = load_examples(DataConfig(data=str(splits), split="test"), PLAIN)
    assert [example.id for example in examples] == ["saved/test:0", "saved/test:1"]
    assert (examples.recipe["source"], examples.recipe["split"]) == ("saved", "test")


def test_the_only_split_needs_no_name_and_one_of_several_does(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "one")
    assert len(load_examples(DataConfig(data=str(tmp_path / "one")), PLAIN)) == 3
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two has several splits; choose one of: a, b"):
        load_examples(DataConfig(data=str(tmp_path / "two")), PLAIN)


def test_a_split_that_is_not_there_is_answered_with_those_that_are(splits, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for where, found in (
        (str(splits), "train, test"),
        (str(tmp_path / "rows.jsonl"), "train"),
        ("stdlib", "train, heldout"),
    ):
        with pytest.raises(DataError, match=f"has no split 'dev'; choose one of: {found}"):
            load_examples(DataConfig(data=where, split="dev"), PLAIN)


def test_the_limit_takes_the_first_rows_and_reads_no_others(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\nnonsense")
    examples = load_examples(DataConfig(data=str(tmp_path / "rows.jsonl"), limit=2), PLAIN)
    assert (len(examples), examples.report.num_rows, examples.recipe["limit"]) == (2, 2, 2)


def test_a_hub_id_is_loaded_by_datasets_in_the_split_that_it_has(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("someone/rows", "train")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples(DataConfig(data="someone/rows"), PLAIN)
    assert (len(examples), examples[0].source, examples.recipe["source"]) == (3, "someone/rows/train", "someone/rows")


def test_what_the_hub_does_not_give_is_one_line(monkeypatch):
    def refuse(name):
        raise ConnectionError("the hub cannot be reached\nand so on")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(DataError, match=r"someone/rows is no file or folder here, and .*: the hub cannot be reached$"):
        load_examples(DataConfig(data="someone/rows"), PLAIN)


def test_datasets_caches_nothing_and_its_bars_are_as_before(splits, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    before = sorted(splits.rglob("*"))
    load_examples(DataConfig(data=str(splits)), PLAIN)
    assert not datasets.are_progress_bars_disabled()
    assert sorted(splits.rglob("*")) == before
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "")


def test_the_embedded_data_set_needs_no_name_and_has_two_splits():
    examples = load_examples(DataConfig(limit=20), CHAT)
    heldout = load_examples(DataConfig(split="heldout", limit=20), CHAT)
    assert {example.source for example in examples} == {"stdlib/train"}
    assert {example.source for example in heldout} == {"stdlib/heldout"}
    assert not {example.id for example in examples} & {example.id for example in heldout}
    assert (examples.recipe["form"], examples.recipe["template"]) == ("instruction + output", "chat")
    assert examples.recipe["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_rows_may_come_from_a_dataset_in_any_format_or_from_a_generator():
    dataset = datasets.Dataset.from_list(ROWS)
    expected = [example.token_ids.tolist() for example in encode(ROWS)]
    for rows in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset(), (row for row in ROWS)):
        examples = examples_from_rows(rows, DataConfig(), PLAIN, source="mine")
        assert [example.token_ids.tolist() for example in examples] == expected
        assert examples[2].id == "mine:2"


# Examples


def test_ids_are_the_rows_own_where_each_has_one_and_all_differ():
    rows = [{"id": key, **row} for key, row in zip(("a", "b", "c"), ROWS, strict=True)]
    assert [example.id for example in encode(rows)] == ["a", "b", "c"]
    assert [example.id for example in encode([row | {"id": number} for number, row in enumerate(ROWS, 7)])] == [
        "7",
        "8",
        "9",
    ]


@pytest.mark.parametrize("ids", [("a", "a", "c"), (1, "1", 2), ("a", None, "c"), (1.5, 2.5, 3.5), (True, False, 2)])
def test_ids_are_row_numbers_where_the_rows_own_are_not_unique_names(ids):
    rows = [{"id": key, **row} for key, row in zip(ids, ROWS, strict=True)]
    assert [example.id for example in encode(rows)] == ["rows:0", "rows:1", "rows:2"]


def test_examples_are_a_sequence_of_arrays_of_the_promised_types():
    examples = encode(ROWS)
    assert len(examples) == len(list(examples)) == 3
    for index, example in enumerate(examples):
        for same in (examples[index], examples[index - 3], examples[np.int64(index)]):
            assert (same.id, same.source) == (example.id, example.source)
            np.testing.assert_array_equal(same.token_ids, example.token_ids)
            np.testing.assert_array_equal(same.target_mask, example.target_mask)
        assert (example.token_ids.dtype, example.target_mask.dtype) == (np.uint32, np.bool_)
        assert not example.target_mask[-1]
    for index in (3, -4):
        with pytest.raises(IndexError):
            examples[index]
    assert examples.num_tokens.dtype == np.int64
    assert examples.num_tokens.tolist() == [len(example.token_ids) for example in examples]


def test_the_dataset_within_holds_compact_columns():
    features = encode(ROWS).dataset.features
    assert features["token_ids"] == datasets.List(datasets.Value("uint32"))
    assert features["target_mask"] == datasets.List(datasets.Value("bool"))


def test_many_rows_are_held_in_order():
    examples = encode([{"text": f"Number {number}."} for number in range(2_345)])
    assert [example.id for example in examples] == [f"rows:{number}" for number in range(2_345)]
    assert PLAIN.decode(examples[2_000].token_ids.tolist()) == "Number 2000.<|endoftext|>"


def test_large_data_sets_live_in_a_mapped_file_of_which_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(examples, "IN_MEMORY_BYTES", 10_000)
    rows = [{"id": number, "text": f"Number {number}:" + " word" * 200} for number in range(2_345)]
    bytes_before = pa.total_allocated_bytes()
    mapped = encode(rows)
    assert pa.total_allocated_bytes() - bytes_before < 100_000 < int(mapped.num_tokens.sum()) * 4
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    for one, other in zip(mapped, encode(rows), strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert pickle.loads(pickle.dumps(mapped))[-1].id == "2344"


def test_examples_made_elsewhere_can_be_held_too():
    made = list(encode(ROWS))
    examples = Examples.from_list(made, {"source": "mine"})
    assert [example.id for example in examples] == [example.id for example in made]
    assert (examples.report.num_rows, examples.report.num_examples) == (3, 3)
    assert examples.recipe == {"source": "mine"}


def test_examples_made_elsewhere_must_be_some_and_have_ids_of_their_own():
    made = list(encode(ROWS))
    with pytest.raises(DataError, match="the list of examples is empty"):
        Examples.from_list([])
    with pytest.raises(DataError, match="two examples have the id 'rows:1'"):
        Examples.from_list([*made, made[1]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros(3, np.int64), np.zeros(3, bool), r"token_ids int64\[3\]"),
        (np.zeros(3, np.uint32), np.zeros(3, np.uint8), r"target_mask uint8\[3\]"),
        (np.zeros(3, np.uint32), np.zeros(2, bool), r"target_mask bool\[2\]; expected uint32 and bool"),
        (np.zeros((1, 3), np.uint32), np.zeros((1, 3), bool), r"uint32\[1, 3\]"),
        (np.zeros(3, np.uint32), np.ones(3, bool), "supervises its last position"),
    ],
)
def test_an_example_is_valid_once_built(ids, mask, message):
    with pytest.raises(DataError, match=message):
        Example("a", "mine", ids, mask)


def test_the_recipe_is_plain_json_without_a_path_and_the_same_on_every_run(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), limit=3, max_length=100, max_prompt_length=50)
    recipe = load_examples(config, PLAIN).recipe
    assert recipe == load_examples(config, PLAIN).recipe == json.loads(json.dumps(recipe))
    assert recipe == {
        "source": "rows.jsonl",
        "split": None,
        "limit": 3,
        "max_length": 100,
        "max_prompt_length": 50,
        "form": "prompt + completion",
        "template": None,
    }
    assert str(tmp_path) not in "".join(example.id + example.source for example in load_examples(config, PLAIN))


def test_a_relative_name_of_this_folder_still_gives_the_folders_name(splits, monkeypatch):
    monkeypatch.chdir(splits)
    assert load_examples(DataConfig(data="."), PLAIN)[0].source == "saved/train"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ""}, "data is empty; expected a file"),
        ({"limit": 0}, "limit is 0"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"max_length": 512, "max_prompt_length": 512}, "no token is left for a response"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**values)


def test_the_report_is_one_line_and_cannot_be_changed():
    report = DataReport(num_rows=1_200, num_examples=1_197, num_prompts_cut=4, num_empty=1, num_unsupervised=2)
    assert str(report) == (
        "1,200 rows, 1,197 examples; 4 prompts and 0 responses cut; 3 dropped "
        "(1 empty, 2 without a supervised token, 0 with too long a prompt)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.num_rows = 0


def test_importing_the_module_imports_neither_torch_nor_transformers_nor_datasets():
    script = "import sys, todi_offline.data; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert answer.stdout == "set()\n"
