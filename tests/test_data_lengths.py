"""Examples that are too long are cut or dropped, long texts are split, and short ones packed."""

import numpy as np
import pytest
from support.rows import CHAT, PLAIN, ROWS, THREE_TURNS, encode, encode_one, marked, with_bos

from todi_offline.data import DataReport
from todi_offline.errors import ConfigError, DataError

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
