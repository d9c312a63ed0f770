"""How long does a capture of 200,000 conversations take to start, and to resume after a kill?

Conversations of two turns are captured by `todi capture`, with a teacher so small that its own time hardly counts.
The first run is killed once its first shards are committed, and the same command is given again:

    tokenised       seconds from the start of the first run until its tokenised rows are kept
    found           seconds from the start of the second run until it captures
    peak            most resident memory of a process, of the run itself and of the processes that tokenise for it;
                    pages of the memory-mapped examples count, though they are given back when memory is short
    a shard         seconds of the second run for each shard, from then on; the run is stopped after some

The start of the run, imports and the teacher's loading are in both times. Both runs are given the same number of
processes.

Not claimed: anything about long rows or other disks.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from todi_offline.data.stdlib_corpus import stdlib_pairs

MORE_SHARDS = 3
"""Shards that the second run commits after its first one before it is stopped."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def run(quick: bool, rows: str = "200000", num_proc: str = "2", folder: str | None = None) -> dict[str, object]:
    num_rows = 20_000 if quick else int(rows)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        work = Path(root)
        _make_teacher(work / "teacher")
        _make_rows(work / "rows.jsonl", num_rows)
        measured = _first_run(work, num_proc) | _second_run(work, num_proc)
        kept = next((work / "kept").glob("*.arrow"))
        facts = json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
        measured["examples"] = facts["report"]["num_examples"]
        measured["kept bytes"] = kept.stat().st_size
    print(f"{num_rows:,} rows of two turns, {num_proc} processes")
    for name, value in measured.items():
        print(f"{name:24}{value:16,.1f}")
    return {"rows": num_rows, "num_proc": int(num_proc), "measured": measured}


def _first_run(work: Path, num_proc: str) -> dict[str, float]:
    started = time.perf_counter()
    process = _start(work, num_proc)
    tokenised = _wait(process, lambda: any((work / "kept").glob("*.json"))) - started
    _wait(process, lambda: _num_shards(work) >= 2)
    process.terminate()
    peaks = _peaks(process)
    return {"tokenised s": tokenised, "peak MB, first run": peaks[0] / 1e6, "peak MB, a worker": peaks[1] / 1e6}


def _second_run(work: Path, num_proc: str) -> dict[str, float]:
    committed = _num_shards(work)
    started = time.perf_counter()
    process = _start(work, num_proc)
    first = _wait(process, lambda: _num_shards(work) > committed)
    last = _wait(process, lambda: _num_shards(work) > committed + MORE_SHARDS)
    num_shards = _num_shards(work) - committed - 1
    process.terminate()
    a_shard = (last - first) / num_shards  # as long as the first one took, too
    peaks = _peaks(process)
    return {"found s": first - started - a_shard, "a shard s": a_shard, "peak MB, second run": peaks[0] / 1e6}


def _num_shards(work: Path) -> int:
    return len(list((work / "cache" / "commits").glob("*.json")))


def _start(work: Path, num_proc: str) -> "subprocess.Popen[str]":
    settings = {
        "teacher": work / "teacher",
        "data": work / "rows.jsonl",
        "out": work / "cache",
        "examples-dir": work / "kept",
        "num-proc": num_proc,
        "k": "8",
        "tail-samples": "2",
        "device": "cpu",
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", __name__, "capture", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def _wait(process: "subprocess.Popen[str]", happened: Any) -> float:
    while not happened():
        if process.poll() is not None:
            raise RuntimeError(f"the capture ended: {process.stderr.read() if process.stderr else ''}")
        time.sleep(0.05)
    return time.perf_counter()


def _peaks(process: "subprocess.Popen[str]") -> list[float]:
    _, error = process.communicate()
    return [float(number) for number in error.rpartition("peaks ")[2].split()[:2]]


def _make_teacher(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((pair.response for pair in stdlib_pairs()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(folder)


def _make_rows(path: Path, num_rows: int) -> None:
    pairs = list(stdlib_pairs())
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            messages: list[dict[str, str]] = []
            for turn in (2 * number, 2 * number + 1):
                pair = pairs[turn % len(pairs)]
                start = turn // len(pairs) * 7 % 80
                messages += [
                    {"role": "user", "content": f"{pair.instruction[-24:]} ({turn})"},
                    {"role": "assistant", "content": pair.response[start : start + 40]},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")


def _main() -> None:
    """Run a command of `todi`, and say at its end what memory it took."""
    import resource

    from todi_offline.commands.cli import main

    try:
        main()
    finally:
        peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print("peaks", *peaks, file=sys.stderr)


if __name__ == "__main__":
    _main()
