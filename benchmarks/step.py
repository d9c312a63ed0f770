"""What does a training step from the cache cost, compared with fine-tuning alone and with a teacher in memory?

Every method trains the same student on the same sequences in the same order with transformers' Trainer, AdamW, in
float32, and its steps are timed from the end of one to the end of the next: data, forward and backward pass, update.

    fused       ToDiTrainer: packed rows, the objective in the forward pass, from hidden states at the targets
    readable    ToDiTrainer as for a head that is no linear layer: packed rows, the objective from logits at the targets
    sft         transformers.Trainer: cross-entropy of responses alone (prompts have the label -100), batches padded to
                their longest sequence with a mask, as its DataCollatorForSeq2Seq makes them
    online      dense ToDi with the teacher in memory, as cheap as it can be: packed rows, and logits only at the
                targets, for teacher and student
    gkd         trl's GKDTrainer with lmbda = 0 (no generation), on the batches of sft; where trl is installed

Tokens a second are real tokens, padding left out. Ratios are medians over the steps of all rounds, without the first
step of each round. A step has the same sequences in every method. The methods take turns by rounds. `without teacher`
is the online step less the time of its teacher's forward pass. Memory is the most that torch's allocator handed out
during one forward and backward pass, gradients included, plus the weights of the student and, if there is one, of the
teacher. The optimizer's states are the same for all methods and are left out.

By default models and tokenizer are made on the spot, of Llama's shape with random weights, and the data are Python's
own documentation. `--set teacher=T --set student=S --set cache=CACHE` takes real ones, the cache being of that teacher;
without a cache, `--set data=D` is captured first. `--set batch_size=8` is the number of sequences in a step. On
`--set device=cuda`, forward and backward passes are under bfloat16's autocast; `--set scale=4` makes models four times
as wide.

Not claimed: anything about other devices, other sizes or several processes, or about the quality of the students.
"""

import copy
import dataclasses
import importlib
import importlib.util
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from benchmarks._peak import now, peak_bytes
from todi_offline import ToDiTrainer, capture, open_cache
from todi_offline.cache.reader import Cache
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.losses import dense_divergence
from todi_offline.models.head import head_of
from todi_offline.models.loading import load_model, load_tokenizer
from todi_offline.training.stream import ShuffledOrder

SEED = 42
BARS = (
    "fused: tokens a second of sft's at least 1.0; time of online's without its teacher at most 0.9; waiting under 1%"
)


@dataclass(frozen=True, slots=True)
class World:
    """What is trained on what."""

    teacher: Any
    student: Any
    tokenizer: Any
    cache: Cache
    batch_size: int
    num_steps: int
    device: str

    def step_tokens(self) -> list[int]:
        """Return the tokens of each step."""
        order = list(ShuffledOrder(len(self.cache), SEED))[: self.num_steps * self.batch_size]
        sums = np.add.reduceat(self.cache.num_tokens[order], np.arange(0, len(order), self.batch_size))
        return [int(num_tokens) for num_tokens in sums]


@dataclass(frozen=True, slots=True)
class Round:
    """The time and memory of one method for each step of a round but the first."""

    seconds: list[float]
    teacher_seconds: list[float]
    wait_shares: list[float]


def run(
    quick: bool,
    teacher: str | None = None,
    student: str | None = None,
    cache: str | None = None,
    data: str = "stdlib",
    batch_size: str = "8",
    device: str = "cpu",
    scale: str = "1",
) -> dict[str, object]:
    num_rounds, num_steps = (1, 3) if quick else (5, 5)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        root = Path(folder)
        if teacher is None or student is None:
            teacher, student = _made_models(root, int(scale), small=quick)
        if cache is None:
            cache = str(root / "cache")
            limit = max(2 * num_steps * int(batch_size), 0 if quick else 64)
            capture(
                teacher,
                data,
                cache,
                k=64,
                tail_samples=8,
                encoding="f16",
                max_length=512,
                max_prompt_length=256,
                limit=limit,
            )
        world = _world(teacher, student, cache, int(batch_size), num_steps, device)
        methods = _methods(world, root)
        rounds = [{name: _round(build, device) for name, build in methods.items()} for _ in range(num_rounds)]
        memory = {name: _memory(build, device) for name, build in methods.items()}
    return _report(world, rounds, memory)


def _world(teacher: str, student: str, cache: str, batch_size: int, num_steps: int, device: str) -> World:
    return World(
        teacher=load_model(teacher, dtype="float32", device=device).eval(),
        student=load_model(student, dtype="float32", device=device),
        tokenizer=load_tokenizer(student),
        cache=open_cache(cache),
        batch_size=batch_size,
        num_steps=num_steps,
        device=device,
    )


def _made_models(root: Path, scale: int, *, small: bool) -> tuple[str, str]:
    """Save a teacher and a student with random weights, whose tokenizer is trained on the data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(
        vocab_size=2_048 if small else 16_384,
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((pair.response for pair in stdlib_pairs()), bpe)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(SEED)
    for name, width, num_layers in (("teacher", 384 * scale, 12), ("student", 256 * scale, 6)):
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=width // 4 if small else width,
            intermediate_size=width if small else 3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return str(root / "teacher"), str(root / "student")


# The methods


class OnlineToDi(ToDiTrainer):
    """ToDi with the teacher in memory, over the whole vocabulary."""

    teacher: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: ARG002
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return CE and dense ToDi, half of each, of the targets."""
        with torch.no_grad():
            teacher = self._logits(self.teacher, inputs)
        student = self._logits(model, inputs)
        losses = nn.functional.cross_entropy(student, inputs["labels"], reduction="none")
        return ((losses + dense_divergence(student, teacher)) / 2).sum() / num_items_in_batch

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with head_of(model).at(inputs["target_positions"]):
            outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        return outputs.logits[0, :, : self._cache.manifest.vocab_size]  # type: ignore[no-any-return, union-attr]


def _methods(world: World, root: Path) -> dict[str, Callable[[], Trainer]]:
    common: dict[str, Any] = {
        "output_dir": str(root / "run"),
        "per_device_train_batch_size": world.batch_size,
        "max_steps": world.num_steps,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": world.device == "cpu",
        "bf16": world.device != "cpu",
        "save_strategy": "no",
        "seed": SEED,
    }

    def from_cache(kind: type[ToDiTrainer]) -> Any:
        args = TrainingArguments(**common)
        return kind(copy.deepcopy(world.student), args, world.cache, processing_class=world.tokenizer)

    def readable() -> Trainer:
        trainer = from_cache(ToDiTrainer)
        trainer.head = dataclasses.replace(trainer.head, is_linear=False)
        return trainer

    def online() -> Trainer:
        trainer = from_cache(OnlineToDi)
        trainer.teacher = world.teacher
        return trainer

    def padded(kind: type[Trainer], args: TrainingArguments, **more: Any) -> Trainer:
        args.remove_unused_columns, args.train_sampling_strategy = False, "sequential"
        args.dataloader_pin_memory = False
        collator = DataCollatorForSeq2Seq(world.tokenizer)
        data = _instructions(world)
        return kind(copy.deepcopy(world.student), args=args, train_dataset=data, data_collator=collator, **more)

    methods: dict[str, Callable[[], Trainer]] = {
        "fused": lambda: from_cache(ToDiTrainer),
        "readable": readable,
        "sft": lambda: padded(Trainer, TrainingArguments(**common)),
        "online": online,
    }
    if importlib.util.find_spec("trl") is None:
        return methods
    trl = importlib.import_module("trl.experimental.gkd")

    def gkd() -> Trainer:
        args = trl.GKDConfig(**common, lmbda=0.0, temperature=1.0, gradient_checkpointing=False)
        return padded(trl.GKDTrainer, args, teacher_model=world.teacher, processing_class=world.tokenizer)

    return {**methods, "gkd": gkd}


def _instructions(world: World) -> Any:
    """Return the sequences of the cache in the order of training, as rows of ids and labels."""
    from datasets import Dataset

    rows = []
    for number in ShuffledOrder(len(world.cache), SEED):
        sequence = world.cache[number]
        ids = sequence.token_ids.astype(np.int64)
        labels = np.full_like(ids, -100)
        supervised = np.flatnonzero(sequence.target_mask) + 1
        labels[supervised] = ids[supervised]
        rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels})
    return Dataset.from_list(rows)


# What is measured


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ends, and the time that a module's forward pass took in each."""

    def __init__(self, timed: nn.Module | None, device: str) -> None:
        """Watch a module, if there is one, on a device."""
        self.device = device
        self.ends: list[float] = []
        self.forward_seconds: list[float] = [0.0]
        self._hooks: list[Any] = []
        if timed is not None:
            self._hooks = [timed.register_forward_pre_hook(self._begin), timed.register_forward_hook(self._end)]

    def _begin(self, *_: Any) -> None:
        self.forward_seconds[-1] -= now(self.device)

    def _end(self, *_: Any) -> None:
        self.forward_seconds[-1] += now(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the end of a step."""
        self.ends.append(now(self.device))
        self.forward_seconds.append(0.0)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()


def _round(build: Callable[[], Trainer], device: str) -> Round:
    trainer = build()
    trainer.remove_callback(PrinterCallback)
    clock = Clock(getattr(trainer, "teacher", None) or getattr(trainer, "teacher_model", None), device)
    trainer.add_callback(clock)
    trainer.train()
    waits = [entry["data_wait_share"] for entry in trainer.state.log_history if "data_wait_share" in entry]
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return Round(seconds, clock.forward_seconds[1 : len(clock.ends)], waits[1:])


def _memory(build: Callable[[], Trainer], device: str) -> dict[str, float]:
    """Return the bytes that are handed out in a pass, and those of the weights."""
    trainer = build()
    batches, num_targets = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device(device))
    teacher = getattr(trainer, "teacher", None) or getattr(trainer, "teacher_model", None)
    parameters = [*trainer.model.parameters(), *(teacher.parameters() if teacher is not None else [])]
    passes = peak_bytes(lambda: trainer.training_step(trainer.model, batches[0], num_targets), device)
    return {"pass": passes, "weights": float(sum(parameter.nbytes for parameter in parameters))}


def _report(world: World, rounds: list[dict[str, Round]], memory: dict[str, dict[str, float]]) -> dict[str, object]:
    seconds = {name: [s for turn in rounds for s in turn[name].seconds] for name in rounds[0]}
    teacher = [s for turn in rounds for s in turn["online"].teacher_seconds]
    seconds["without teacher"] = [whole - part for whole, part in zip(seconds["online"], teacher, strict=True)]
    tokens = world.step_tokens()[1:] * len(rounds)
    rates = {
        name: statistics.median(n / s for n, s in zip(tokens, taken, strict=True)) for name, taken in seconds.items()
    }
    total = {name: sum(parts.values()) for name, parts in memory.items()}

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    columns = ("sft", "online", "without teacher")
    print(
        f"{torch.get_num_threads()} threads, {world.batch_size} sequences a step, {statistics.mean(tokens):.0f} tokens"
    )
    print(f"{'':16}{'tokens/s':>10}" + "".join(f"{f'time/{c}':>21}" for c in columns) + f"{'MiB':>9}{'of sft':>8}")
    for name in seconds:
        line = f"{name:16}{rates[name]:10.0f}" + "".join(f"{ratio(name, c):20.3f}x" for c in columns)
        print(line + (f"{total[name] / 2**20:9.0f}{total[name] / total['sft']:7.2f}x" if name in total else ""))
    wait = statistics.median(share for turn in rounds for share in turn["fused"].wait_shares)
    print(f"\n{BARS}")
    print(f"found: {1 / ratio('fused', 'sft'):.3f}; {ratio('fused', 'without teacher'):.3f}; {wait:.2%}")
    return {
        "sizes": {"sequences a step": world.batch_size, "tokens a step": tokens, "steps": len(tokens)},
        "models": {name: _described(model) for name, model in (("teacher", world.teacher), ("student", world.student))},
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "time_ratios": {c: {name: round(ratio(name, c), 3) for name in seconds} for c in columns},
        "bytes": memory,
        "data_wait_share": round(wait, 5),
    }


def _described(model: Any) -> dict[str, int]:
    config = model.config
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(config, name) for name in names} | {"parameters": sum(p.numel() for p in model.parameters())}
