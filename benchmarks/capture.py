"""What does a capture cost beyond the teacher's own forward pass?

Two ways to read the same examples in the same batches are compared, in one process and in turns:

    bare            the teacher with its head at the supervised positions, a chunk of logits at a time, all dropped
    capture         `capture()`: the same, the targets taken from the logits, encoded, written, committed and sealed

The teacher has the shape of SmolLM2-135M and random weights, and reads Python's own documentation through a tokenizer
made on the spot; `--set teacher=FOLDER` takes a real one. The fingerprint of the teacher is computed once in a capture
of any length, so its time is also shown alone.

With `--set ranks=2`, `--set actors=2` or both, captures in one process, in that many ranks of torchrun and in that
many actors of Ray are compared, in turns. Each worker has one thread. The time to start is shown alone.

`--set device=cuda` takes a GPU, where the teacher is faster and the same encoding must keep up with it; `--set
limit=200` takes more examples.

Not claimed: anything about other devices.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks._peak import now
from benchmarks._scaling import compare
from todi_offline.capturing import capture
from todi_offline.data import DataConfig, Examples, load_examples
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.teacher.in_transformers import (
    Teacher,
    TeacherConfig,
    as_teacher,
    length_batches,
    load_teacher,
    padded_length,
    teacher_fingerprint,
)

VOCAB, BATCH_TOKENS, CHUNK_ROWS = 49_152, 4096, 256
BAR = 0.95
"""The capture's rate over the bare pass's, at least."""


def run(
    quick: bool,
    teacher: str | None = None,
    ranks: str | None = None,
    actors: str | None = None,
    layers: str = "2",
    texts: str = "60",
    repetitions: str = "3",
    device: str = "cpu",
    limit: str = "12",
) -> dict[str, object]:
    workers = {name: int(number) for name, number in (("ranks", ranks), ("actors", actors)) if number}
    if workers:
        made_up = _made_up_teacher(1 if quick else int(layers), "cpu")
        return compare(made_up, workers, 1 if quick else int(repetitions), 20 if quick else int(texts))
    return _against_the_bare_pass(quick, teacher, device, int(limit))


def _against_the_bare_pass(quick: bool, teacher: str | None, device: str, limit: int) -> dict[str, object]:
    repetitions, limited = (1, min(limit, 4)) if quick else (9, limit)
    if teacher is None:
        loaded = _made_up_teacher(2 if quick else 30, device)
    else:
        loaded = load_teacher(TeacherConfig(teacher=teacher, device=device))
    examples = load_examples(DataConfig(limit=limited), loaded.tokenizer)
    num_tokens = int(examples.num_tokens.sum())
    seconds: dict[str, list[float]] = {"bare": [], "capture": [], "fingerprint": []}
    for _ in range(repetitions):
        seconds["bare"].append(_seconds(device, partial(_bare, loaded, examples)))
        with tempfile.TemporaryDirectory() as folder:
            seconds["capture"].append(_seconds(device, partial(capture, loaded, examples, Path(folder) / "cache")))
        seconds["fingerprint"].append(_seconds(device, partial(teacher_fingerprint, loaded)))
    rows = zip(*seconds.values(), strict=True)
    whole, shards = zip(*((bare / took, bare / (took - once)) for bare, took, once in rows), strict=True)
    for name, values in seconds.items():
        print(f"{name:12}{statistics.median(values):8.2f} s{num_tokens / statistics.median(values):10,.0f} tokens/s")
    ratio = statistics.median(shards)
    print(f"\ncapture over bare: {statistics.median(whole):.3f} of its rate; without the fingerprint {ratio:.3f}")
    print(f"at least {BAR}: {'met' if ratio >= BAR else 'MISSED'}; padding {_padding(examples):.1%} of the batches")
    return {
        "teacher": teacher and Path(teacher).name,
        "tokens": num_tokens,
        "targets": int(sum(example.target_mask.sum() for example in examples)),
        "threads": torch.get_num_threads(),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "rate over bare": {"whole": round(statistics.median(whole), 3), "without the fingerprint": round(ratio, 3)},
        "padding": round(_padding(examples), 4),
    }


def _seconds(device: str, work: Callable[[], object]) -> float:
    started = now(device)
    work()
    return now(device) - started


def _batches(examples: Examples) -> list[list[int]]:
    return length_batches(examples.num_tokens.tolist(), BATCH_TOKENS)


def _padding(examples: Examples) -> float:
    """Return the share of padding in all batches."""
    lengths = examples.num_tokens
    return 1 - int(lengths.sum()) / sum(map(padded_length, lengths.tolist()))


@torch.no_grad()
def _bare(teacher: Teacher, examples: Examples) -> None:
    assert teacher.head.runs_apart, "these teachers have a plain head"
    for batch in _batches(examples):
        members = [examples[index] for index in batch]
        length = padded_length(max(len(example.token_ids) for example in members))
        input_ids = np.zeros((len(members), length), np.int64)
        for row, example in enumerate(members):
            input_ids[row, : len(example.token_ids)] = example.token_ids
        columns = [row * length + np.flatnonzero(example.target_mask) for row, example in enumerate(members)]
        positions = torch.from_numpy(np.concatenate(columns))
        ids = torch.from_numpy(input_ids).to(teacher.model.device)
        hidden = teacher.head.hidden_states(positions, input_ids=ids)
        for chunk in torch.split(hidden, CHUNK_ROWS):
            teacher.head.logits(chunk)


def _made_up_teacher(layers: int, device: str) -> Teacher:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=["<unk>", "<eos>"], show_progress=False)
    texts = (pair.response for pair in stdlib_pairs()[:400])
    tokenizer.train_from_iterator(texts, trainer)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    made = as_teacher(LlamaForCausalLM(config).to(device), fast)
    return Teacher(made.model, made.tokenizer, VOCAB, made.head)
