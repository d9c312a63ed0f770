"""A student's responses, token by token, and their ROUGE-L against references."""

import itertools
import json
import statistics
import sys

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.tiny_models import gemma2, gpt2, llama
from transformers import GenerationConfig

from todi_offline.data import ALPACA, DataConfig, examples_from_rows
from todi_offline.errors import ConfigError, DataError
from todi_offline.evaluation import Generation, Prompts, evaluate_generation, load_prompts
from todi_offline.evaluation.generation import rouge_l_scorer

QUESTIONS = ["Go on.", "What is a list, and what is it for?", "Sort.", "Name the " + "very " * 20 + "last one."]
ROWS = [{"instruction": question, "output": ["a list", f"answer {n}"]} for n, question in enumerate(QUESTIONS)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_of(folder, rows=ROWS, *, chat=True, max_prompt_length=256, **config) -> Prompts:
    file = write(folder / "rows.jsonl", rows)
    lengths = {"max_prompt_length": max_prompt_length, "max_length": max_prompt_length + 1}
    return load_prompts(DataConfig(data=file, **lengths, **config), tiny_tokenizer(chat))


def generated(model, questions: Prompts, folder, **settings) -> tuple[Generation, dict[str, list[dict]]]:
    """Evaluate, and return the summary and the rows of each file of predictions by its run."""
    chosen = {"max_new_tokens": 12, "out": folder} | settings
    found = evaluate_generation(model, tiny_tokenizer(), questions, **chosen)
    files = {file.stem.removeprefix("predictions-"): file for file in folder.glob("predictions-*.jsonl")}
    return found, {run: [json.loads(line) for line in file.read_text().splitlines()] for run, file in files.items()}


def predictions(*args, **settings):
    return {run: [row["prediction"] for row in rows] for run, rows in generated(*args, **settings)[1].items()}


def decoded(ids) -> str:
    return tiny_tokenizer().decode(ids, skip_special_tokens=True).strip()


def greedily(model, prompt, num_tokens: int) -> str:
    """Return a greedy response, generated without a KV cache, padding or batch."""
    ids = list(prompt.token_ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in (2, prompt.end_id):
            break
        ids.append(token)
    return decoded(ids[len(prompt.token_ids) :])


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
def test_a_batch_of_unequal_prompts_gives_the_same_responses_as_each_prompt_alone(build, tmp_path):
    model, questions = build(seed=1), prompts_of(tmp_path)
    lengths = {len(prompt.token_ids) for prompt in questions.prompts}
    assert len(lengths) == len(questions.prompts)
    expected = [greedily(model, prompt, 12) for prompt in questions.prompts]
    assert len(set(expected)) > 1
    for batch_size in (4, 3, 1):
        found = predictions(model, questions, tmp_path / str(batch_size), greedy=True, batch_size=batch_size)
        assert found == {"greedy": expected}


def test_a_seed_decides_the_samples_and_the_global_generator_is_restored(tmp_path):
    model, questions = llama(), prompts_of(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = predictions(model, questions, tmp_path / "a", seeds=(10, 20))
    torch.testing.assert_close(torch.rand(3), expected)
    assert first.keys() == {"10", "20"}
    assert first["10"] != first["20"]
    assert predictions(model, questions, tmp_path / "b", seeds=(20,)) == {"20": first["20"]}


def test_samples_come_from_the_full_distribution_whatever_the_models_generation_config(tmp_path):
    model, questions = llama(), prompts_of(tmp_path)
    plain = predictions(model, questions, tmp_path / "a", seeds=(1,))
    own = GenerationConfig(do_sample=False, temperature=0.1, top_k=1, repetition_penalty=9.0, max_new_tokens=2)
    model.generation_config = own
    assert predictions(model, questions, tmp_path / "b", seeds=(1,)) == plain
    assert model.generation_config is own

    # The first token of many samples has the frequencies of the softmax.
    prompts = Prompts(questions.prompts[:1] * 400)
    found = predictions(model, prompts, tmp_path / "c", seeds=(1, 2, 3, 4, 5), max_new_tokens=1, batch_size=400)
    ids = torch.tensor([questions.prompts[0].token_ids])
    probabilities = model(input_ids=ids).logits[0, -1].detach().softmax(-1)
    words = [decoded([token]) for token in range(512)]
    drawn = list(itertools.chain.from_iterable(found.values()))
    for token in probabilities.topk(5).indices.tolist():
        expected = sum(float(probabilities[n]) for n in range(512) if words[n] == words[token])
        deviation = (expected * (1 - expected) / len(drawn)) ** 0.5
        assert abs(drawn.count(words[token]) / len(drawn) - expected) < 4 * deviation


def test_ids_outside_the_tokenizer_are_never_drawn(tmp_path):
    model, questions = llama(), prompts_of(tmp_path)
    expected = predictions(model, questions, tmp_path / "a", greedy=True)
    model.resize_token_embeddings(560, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[512:] = 100 * model.lm_head.weight[:48]
    assert predictions(model, questions, tmp_path / "b", greedy=True) == expected


def preferring(*tokens: int):
    """Return a model that always prefers these tokens, in this order."""
    model = llama(eos_token_id=None)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 512)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[list(tokens)] = torch.linspace(9, 5, len(tokens))
    return model


def test_a_response_ends_at_the_tokens_that_end_it_in_training(tmp_path):
    """These are the end-of-turn token of the chat template and the tokenizer's EOS, even if they differ."""
    questions, tokenizer = prompts_of(tmp_path), tiny_tokenizer()
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    assert {prompt.end_id for prompt in questions.prompts} == {turn_end} != {tokenizer.eos_token_id}
    for token in (turn_end, tokenizer.eos_token_id):
        found = evaluate_generation(preferring(token), tokenizer, questions, greedy=True)
        assert (found.share_ended, found.mean_new_tokens, found.rouge_l) == (1, 1, 0)
    found = evaluate_generation(preferring(300), tokenizer, questions, greedy=True, max_new_tokens=7)
    assert (found.share_ended, found.mean_new_tokens) == (0, 7)


def test_rouge_is_the_best_over_references_then_the_mean_over_prompts_then_over_seeds(tmp_path):
    rows = [row | {"output": [f"a list {n}", "what a list is for"]} for n, row in enumerate(ROWS)]
    found, files = generated(llama(), prompts_of(tmp_path, rows), tmp_path, seeds=(10, 20, 30), max_new_tokens=40)
    score = rouge_l_scorer()
    means = {}
    for run, written in files.items():
        for row, given in zip(written, rows, strict=True):
            assert row["references"] == given["output"]
            assert given["instruction"] in row["prompt"]
            assert row["rouge_l"] == max(score(row["prediction"], reference) for reference in given["output"])
        means[run] = statistics.fmean(row["rouge_l"] for row in written)
    assert found.rouge_l_by_run == pytest.approx(means)
    assert found.rouge_l == pytest.approx(statistics.fmean(means.values()))
    assert found.rouge_l_deviation == pytest.approx(statistics.stdev(means.values()))
    assert found.rouge_l > 0
    alone, _ = generated(llama(), prompts_of(tmp_path, rows), tmp_path / "greedy", greedy=True)
    assert alone.rouge_l_deviation is None


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_of_stems():
    score = rouge_l_scorer()
    assert score("The cats are running, quickly", "a cat was running home") == pytest.approx(100 * 2 * 2 / (5 + 5))
    assert score("one two three four", "four one three") == pytest.approx(100 * 2 * 2 / (4 + 3))
    assert score("the same", "The same!") == 100
    assert score("", "something") == 0


def test_no_repeat_ngram_size_forbids_repeated_n_grams(tmp_path):
    model, questions = preferring(400, 401, 402), prompts_of(tmp_path)
    settings = {"greedy": True, "max_new_tokens": 5}
    free = predictions(model, questions, tmp_path / "a", **settings)
    assert free["greedy"] == [decoded([400] * 5)] * 4
    bound = predictions(model, questions, tmp_path / "b", **settings, no_repeat_ngram_size=2)
    assert bound["greedy"] == [decoded([400, 400, 401, 400, 402])] * 4


# Prompts


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Sort these.", "output": "Done."},
        {"instruction": "Sort these.", "input": "b a", "response": "Done."},
        {"instruction": "Sort these.", "prompt": "Sort these:\n", "output": "Done."},
        {"prompt": "Sort these:\n", "completion": "Done."},
    ],
)
def test_a_prompt_equals_the_tokens_before_the_response_in_training(row, chat, tmp_path):
    example = examples_from_rows([row], DataConfig(), tiny_tokenizer(chat))[0]
    first = int(example.target_mask.argmax()) + 1
    (prompt,) = prompts_of(tmp_path, [row], chat=chat).prompts
    assert prompt.token_ids == tuple(example.token_ids[:first].tolist())
    assert prompt.end_id == example.token_ids[-1]
    assert prompt.references == ("Done.",)


def test_the_last_answer_of_a_conversation_is_the_reference(tmp_path):
    def message(role, content):
        return {"role": role, "content": content}

    turns = [message("user", "One?"), message("assistant", "1"), message("user", "Two?"), message("assistant", "2")]
    (prompt,) = prompts_of(tmp_path, [{"id": "x", "messages": turns}]).prompts
    assert (prompt.id, prompt.references) == ("x", ("2",))
    text = tiny_tokenizer().decode(prompt.token_ids)
    assert text.endswith("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n")
    assert "1<|im_end|>" in text
    pair = {"prompt": turns[:3], "completion": turns[3:]}
    assert prompts_of(tmp_path, [pair]).prompts[0].token_ids == prompt.token_ids


def test_a_long_prompt_loses_its_middle_and_is_counted(tmp_path):
    rows = [{"instruction": "x " * 300 + "the end", "output": "y"}, {"instruction": "Short.", "output": "y"}]
    found = prompts_of(tmp_path, rows, chat=False, max_prompt_length=60)
    long, short = found.prompts
    assert len(long.token_ids) == 60
    assert tiny_tokenizer().decode(long.token_ids).endswith("the end\n\n### Response:\n")
    assert found.num_cut == 2  # Alpaca's own words are longer than 60 tokens of this tokenizer
    whole, kept = ALPACA.format(instruction="Short."), tiny_tokenizer().decode(short.token_ids)
    half = next(n for n in range(len(kept), 0, -1) if whole.startswith(kept[:n]))
    assert whole.endswith(kept[half:])


def test_a_row_that_is_too_long_even_after_cutting_is_dropped_and_counted(tmp_path):
    turns = [{"role": "system", "content": "long " * 60}, {"role": "user", "content": "Hi."}]
    turns += [{"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": [{"role": "user", "content": "no answer"}]}]
    rows += [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}]
    found = prompts_of(tmp_path, rows, max_prompt_length=40)
    assert (len(found.prompts), found.num_dropped) == (1, 2)
    with pytest.raises(DataError, match=r"gives no prompt: 2 rows do not end with .* exceed max_prompt_length, 40"):
        prompts_of(tmp_path, rows[:2], max_prompt_length=40)


def test_limit_reads_only_the_first_rows(tmp_path):
    assert [prompt.id for prompt in prompts_of(tmp_path, limit=2).prompts] == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Once."}, "row 0 .*has the columns text; expected messages, completion, output or response"),
        ({"instruction": "a", "output": []}, "row 0 .*'output' holds .*; expected a list that is not empty"),
        ({"instruction": "a", "output": ["b", 3]}, "row 0 .*'output' holds .*; expected a text, or a list of texts"),
        ({"instruction": "a", "output": None}, "row 0 .*'output' holds .*; expected a text, or a list of texts"),
        ({"messages": "hello"}, "row 0 .*'messages' holds 'hello'; expected a list that is not empty"),
        ({"messages": ["hello"]}, "row 0 .*the last message is 'hello'; expected an object with role and content"),
        ({"output": "b"}, "columns"),
        ({"prompt": "", "completion": "a"}, "row 0 .*the prompt is empty"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "row 0 .*the chat template leaves out tools"),
    ],
)
def test_a_row_without_a_prompt_or_an_answer_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prompts_of(tmp_path, [row])


def test_a_missing_rouge_score_is_an_error_with_the_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'todi-offline\[evaluate\]'"):
        evaluate_generation(llama(), tiny_tokenizer(), prompts_of(tmp_path))
