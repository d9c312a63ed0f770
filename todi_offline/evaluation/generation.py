"""A student and instructions with references come in; the student's responses and their ROUGE-L go out.

The protocol is that of the ToDi paper's scripts and of MiniLLM, DistiLLM and DSKD before them. The student samples from
its full distribution at temperature 1: up to 256 new tokens after a prompt of at most 256, once for each of five seeds.
ROUGE-L is rouge-score's F-measure with stemming, times 100. The best over the references counts; the result is the mean
over instructions, and then mean and deviation over seeds.

The code of DSKD, which those scripts run, differs in three ways. It forbids repeated 6-grams in its tests; here
`no_repeat_ngram_size` is 0 by default. It cuts a long prompt at its end, which asks for the response; here a prompt
loses its oldest turns or its middle, as in training. It can draw ids of a padded embedding that the tokenizer does not
know; here these ids are suppressed.
"""

import contextlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from todi_offline.data import DataConfig
from todi_offline.data.encoder import make_encoder
from todi_offline.data.forms import Form, columns_of, encoder_of, recognise_form
from todi_offline.data.questions import without_answer
from todi_offline.data.sources import open_source
from todi_offline.data.tokens import Dropped
from todi_offline.errors import ConfigError, DataError
from todi_offline.models.head import head_of
from todi_offline.models.loading import Model, Tokenizer, evaluation_mode, real_vocab_size

Progress = Callable[[int, int], None]

SEEDS = (10, 20, 30, 40, 50)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the student, and the references for its response."""

    id: str
    token_ids: tuple[int, ...]
    end_id: int
    """The token that ends a response in training: EOS, or the end-of-turn token of the chat template."""
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a data set."""

    prompts: tuple[Prompt, ...]
    num_cut: int = 0
    num_dropped: int = 0
    """Rows without a prompt: they do not end with an assistant's answer, or are too long even after cutting."""


@dataclass(frozen=True, slots=True)
class Generation:
    """ROUGE-L of a student's responses against the references."""

    num_prompts: int
    num_prompts_cut: int
    num_dropped: int
    rouge_l: float
    """Times 100; the mean over runs."""
    rouge_l_deviation: float | None
    """Sample standard deviation over runs; None for a single one."""
    rouge_l_by_run: dict[str, float]
    """Keys are the seeds, or `greedy`."""
    mean_new_tokens: float
    share_ended: float
    """Share of responses that the student ended itself, within `max_new_tokens`."""


@dataclass(frozen=True, slots=True)
class _Response:
    text: str
    num_tokens: int
    ended: bool


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> Prompts:
    """Read a data set as prompts and references.

    The rows may have any form of `todi_offline.data` with a response. The last of `messages` is the reference;
    `output`, `response` and `completion` may be lists of references.

    Raises:
        DataError, ModelError: as `todi_offline.data.load_examples`.
    """
    source, encoder = open_source(config), make_encoder(tokenizer, config)
    form: Form | None = None
    prompts: list[Prompt] = []
    num_cut = num_dropped = 0
    for number, row in enumerate(itertools.islice(source.rows, config.limit)):
        try:
            question, references = without_answer(columns_of(row, "the row"))
            if form is None:
                form = recognise_form(question, encoder, source.name)
                encoder = encoder_of(form, encoder)
            tokens = form.encode(encoder, question)
            if tokens.supervised[0]:
                raise DataError("the prompt is empty, so there is nothing to answer; take such rows out")
        except Dropped:
            num_dropped += 1
            continue
        except DataError as error:
            raise DataError(f"{source.name}, row {number} (counted from 0): {error}") from error
        num_cut += tokens.prompt_cut
        ids = tuple(tokens.ids[: tokens.supervised.index(True)])
        prompts.append(Prompt(str(row.get("id", number)), ids, tokens.ids[-1], references))
    if not prompts:
        raise DataError(
            f"{source.name} gives no prompt: {num_dropped} rows do not end with an assistant's answer, or exceed "
            f"max_prompt_length, {config.prompt_limit}, even after cutting; use other rows, or raise max_prompt_length"
        )
    return Prompts(tuple(prompts), num_cut, num_dropped)


def evaluate_generation(
    model: Model,
    tokenizer: Tokenizer,
    questions: Prompts,
    *,
    seeds: Sequence[int] = SEEDS,
    greedy: bool = False,
    max_new_tokens: int = 256,
    no_repeat_ngram_size: int = 0,
    batch_size: int = 8,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Generate responses once for each seed, or once with `greedy`, and compare them with the references.

    Only the EOS tokens of the model's own generation config are used. The same seed, batch size, device and libraries
    give the same responses. After each run, `out` receives `predictions-SEED.jsonl` or `predictions-greedy.jsonl`.

    Raises:
        ConfigError: rouge-score is not installed.
        DataError: a prompt holds an id that the student's head lacks.
    """
    score, prompts = rouge_l_scorer(), questions.prompts
    settings = _generation_settings(model, tokenizer, prompts)
    settings.update(max_new_tokens=max_new_tokens, no_repeat_ngram_size=no_repeat_ngram_size)
    if not greedy:
        settings.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    runs = {"greedy": 0} if greedy else {str(seed): seed for seed in seeds}
    all_responses: list[_Response] = []
    rouge: dict[str, float] = {}

    def report(num_done: int) -> None:
        if progress:
            progress(len(all_responses) + num_done, len(runs) * len(prompts))

    for run, seed in runs.items():
        responses = _respond(model, tokenizer, prompts, settings, batch_size, seed, report)
        scores = [
            max(score(response.text, reference) for reference in prompt.references)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        if out:
            _write(out / f"predictions-{run}.jsonl", tokenizer, prompts, responses, scores)
        all_responses += responses
        rouge[run] = statistics.fmean(scores)
    return Generation(
        num_prompts=len(prompts),
        num_prompts_cut=questions.num_cut,
        num_dropped=questions.num_dropped,
        rouge_l=statistics.fmean(rouge.values()),
        rouge_l_deviation=statistics.stdev(rouge.values()) if len(rouge) > 1 else None,
        rouge_l_by_run=rouge,
        mean_new_tokens=statistics.fmean(response.num_tokens for response in all_responses),
        share_ended=statistics.fmean(response.ended for response in all_responses),
    )


def answer(model: Model, tokenizer: Tokenizer, questions: Prompts, max_new_tokens: int) -> list[str]:
    """Return a model's response to each prompt; the most probable token is taken each time."""
    settings = _generation_settings(model, tokenizer, questions.prompts)
    settings.update(max_new_tokens=max_new_tokens)
    responses = _respond(model, tokenizer, questions.prompts, settings, len(questions.prompts), 0, lambda _: None)
    return [response.text for response in responses]


def rouge_l_scorer() -> Callable[[str, str], float]:
    """Return ROUGE-L of a response and a reference: rouge-score's F-measure with stemming, times 100.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("ROUGE-L needs rouge-score: pip install 'todi-offline[evaluate]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda response, reference: 100.0 * scorer.score(reference, response)["rougeL"].fmeasure


def _generation_settings(model: Model, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Any:
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(prompt.end_id for prompt in prompts)}
    ends |= set(own if isinstance(own, list) else [] if own is None else [own])
    num_ids = head_of(model).num_ids
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= num_ids:
            raise DataError(
                f"prompt {prompt.id!r} holds the id {largest}, but the student's head has only {num_ids} ids"
            )
    return GenerationConfig(
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=list(range(real_vocab_size(tokenizer, num_ids), num_ids)) or None,
    )


def _respond(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Any,
    batch_size: int,
    seed: int,
    report: Callable[[int], None],
) -> list[_Response]:
    """Return the response to each prompt. Batches are sorted by length, which saves padding."""
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].token_ids))
    responses: dict[int, _Response] = {}
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluation_mode(model),
        _generation_config_of(model, settings),
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            inputs = _left_padded([prompts[number].token_ids for number in numbers], settings.pad_token_id)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            generated = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
            for number, ids in zip(numbers, generated.tolist(), strict=True):
                responses[number] = _response(tokenizer, ids, settings.eos_token_id)
            report(len(responses))
    return [responses[number] for number in range(len(prompts))]


def _left_padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, sequences))
    num_pads = [longest - len(sequence) for sequence in sequences]
    return {
        "input_ids": torch.tensor([[pad] * num + list(ids) for num, ids in zip(num_pads, sequences, strict=True)]),
        "attention_mask": torch.tensor([[0] * num + [1] * (longest - num) for num in num_pads]),
    }


@contextlib.contextmanager
def _generation_config_of(model: Model, settings: Any) -> Iterator[None]:
    """Replace the model's generation config for a while: `generate` fills unset fields from the model's own."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _response(tokenizer: Tokenizer, ids: list[int], ends: Sequence[int]) -> _Response:
    length = next((number for number, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
    ended = length < len(ids)
    return _Response(text, length + ended, ended)


def _write(
    file: Path,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[_Response],
    scores: Sequence[float],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            row = {
                "id": prompt.id,
                "prompt": tokenizer.decode(prompt.token_ids),
                "prediction": response.text,
                "references": prompt.references,
                "rouge_l": score,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
