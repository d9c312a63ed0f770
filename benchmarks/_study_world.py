"""Settings in; a teacher, the students before training, and the text that all of them read out."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from todi_offline.data import DataConfig, Example, Examples, load_examples
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.models.loading import Model, load_model
from todi_offline.student import prune_depth, spaced_layers
from todi_offline.teacher.in_transformers import Teacher, TeacherConfig, as_teacher, load_teacher
from todi_offline.training.stream import ShuffledOrder

ON_THE_SPOT = "on the spot"
BLOCK_TOKENS = 128
NUM_TRAIN, NUM_HELDOUT = 640, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The teacher, the text, the students and the length of training: all that decides a row beside its arm."""

    teacher: str = ON_THE_SPOT
    """A folder, hub id or GGUF file; or a small Llama that is trained here."""
    data: str = "stdlib"
    """The text of a given teacher; the one trained on the spot reads `stdlib` in blocks of 128 tokens."""
    heldout: str = "stdlib"
    vocab: int = 4096
    """Ids of the tokenizer that is trained on the spot."""
    teacher_steps: int = 300
    warm_steps: int = 200
    """Steps of plain fine-tuning that make the warm student."""
    layers: int = 10
    """Layers of the student that is cut from a given teacher."""
    steps: int = 120
    batch_sequences: int = 8
    learning_rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class World:
    """A teacher, students and text."""

    settings: Settings
    teacher: Teacher
    students: dict[str, Model]
    train: Examples
    heldout: Examples

    def student(self, start: str) -> Model:
        """Return a copy of a student before training."""
        return copy.deepcopy(self.students[start])


def make_world(settings: Settings, work: Path) -> World:
    """Make a world, or load the parts that an earlier run made in `work`."""
    return _on_the_spot(settings, work) if settings.teacher == ON_THE_SPOT else _around_teacher(settings, work)


def optimise(model: Model, losses: Iterator[Tensor], steps: int, learning_rate: float) -> None:
    """Take a step of AdamW for each of the losses: a short warm-up, a cosine down to zero, norms clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step, loss in zip(range(steps), losses, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def batches(num_sequences: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of sequence numbers without end; an incomplete batch at the end of an epoch is dropped."""
    order = ShuffledOrder(num_sequences, seed)
    while True:
        indices = list(order)
        yield from (indices[start : start + size] for start in range(0, len(indices) - size + 1, size))
        order.set_epoch(order.epoch + 1)


def _on_the_spot(settings: Settings, work: Path) -> World:
    tokenizer = _tokenizer(settings.vocab)
    text, heldout = _blocks(tokenizer, "train"), _blocks(tokenizer, "heldout")
    teacher = _made_once(
        work / "teacher", lambda: _pretrained(_llama(settings.vocab, 256, 4), text, settings.teacher_steps)
    )
    warm = _made_once(work / "warm", lambda: _pretrained(_llama(settings.vocab, 128, 2), text, settings.warm_steps))
    students = {"warm": warm, "cold": _llama(settings.vocab, 128, 2)}
    return World(
        settings,
        as_teacher(teacher, tokenizer),
        students,
        Examples.from_list(text[:NUM_TRAIN]),
        Examples.from_list(heldout[:NUM_HELDOUT]),
    )


def _around_teacher(settings: Settings, work: Path) -> World:
    teacher = load_teacher(TeacherConfig(teacher=settings.teacher, dtype="float32"))

    def read(data: str, split: str, limit: int) -> Examples:
        named = split if data == "stdlib" else None
        config = DataConfig(data=data, split=named, limit=limit, max_length=256, max_prompt_length=128)
        return load_examples(config, teacher.tokenizer)

    train, heldout = read(settings.data, "train", 2_000), read(settings.heldout, "heldout", 100)
    layers = spaced_layers(teacher.model.config.num_hidden_layers, settings.layers)
    pruned = prune_depth(teacher.model, layers)
    warm = _made_once(work / "warm", lambda: _pretrained(pruned, list(train), settings.warm_steps, 5e-4))
    torch.manual_seed(0)
    cold = AutoModelForCausalLM.from_config(pruned.config).to(pruned.device)
    return World(settings, teacher, {"warm": warm, "cold": cold}, train, heldout)


def _made_once(folder: Path, make: Any) -> Model:
    if not (folder / "config.json").exists():
        make().save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def _llama(vocab: int, width: int, num_layers: int) -> Model:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2 * BLOCK_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _pretrained(model: Model, examples: Sequence[Example], steps: int, learning_rate: float = 2e-3) -> Model:
    """Train a model on text, and return it."""
    device = model.get_input_embeddings().weight.device

    def losses() -> Iterator[Tensor]:
        for batch in batches(len(examples), 8, seed=1):
            members = [examples[index] for index in batch]
            length = max(len(example.token_ids) for example in members)
            input_ids = torch.zeros(len(members), length, dtype=torch.long)
            labels = torch.full_like(input_ids, -100)
            for row, example in enumerate(members):
                tokens = torch.from_numpy(example.token_ids.astype(np.int64))
                supervised = torch.from_numpy(example.target_mask)[:-1]
                input_ids[row, : len(tokens)] = tokens
                labels[row, 1 : len(tokens)] = tokens[1:].where(supervised, -100)
            yield model(input_ids=input_ids.to(device), labels=labels.to(device), use_cache=False).loss

    optimise(model.train(), losses(), steps, learning_rate)
    return model.eval()


def _texts(split: str) -> list[str]:
    return [f"{pair.instruction}\n\n{pair.response}\n\n" for pair in stdlib_pairs(split)]


def _tokenizer(vocab: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts("train"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _blocks(tokenizer: Any, split: str) -> list[Example]:
    """Return the text of a split as blocks of tokens in random order, every position supervised."""
    tokens = [token for text in _texts(split) for token in (0, *tokenizer(text)["input_ids"])]
    starts = range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS)
    mask = np.arange(BLOCK_TOKENS) < BLOCK_TOKENS - 1
    blocks = [
        Example(str(start), split, np.array(tokens[start : start + BLOCK_TOKENS], np.uint32), mask) for start in starts
    ]
    return [blocks[index] for index in np.random.default_rng(0).permutation(len(blocks))]
