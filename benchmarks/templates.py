"""What becomes of conversations of each family that trl ships a chat template for?

Each template is given to a small tokenizer that knows the special tokens that the template writes. The table has what
is supervised in one turn, in two turns, in two turns with thoughts, and in a call of a tool and its result:

    yes         the answers, as the model would generate them, and nothing of the template's own
    last only   thoughts of earlier turns are left out by the template, those of the last are supervised
    left out    the template writes no thoughts; the answers are supervised, and a warning counts the rows
    refused     with the reason; no row is trained on in another way than it says

`template` names the template: the tokenizer's own, or the training template that trl publishes for it.

Not claimed: anything about the templates that others publish, or about images.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks._environment import environment, listed
from todi_offline.data import DataConfig, Examples, examples_from_rows
from todi_offline.errors import DataError

RESULT = Path(__file__).parent / "results" / "templates.md"
OTHERS = ("diffusion_gemma", "idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm")
"""For images, or no language models of the usual kind."""

_SPECIAL = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜<>']+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
_SCAFFOLD = re.compile(r"<think>\s*</think>|^\s*</think>")

QUESTIONS, ANSWERS, THOUGHTS = ("Who wrote it?", "And when?"), ("Nobody knows.", "Long ago."), ("Hm, who.", "So, when.")
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "lookup", "arguments": {"word": "it"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "Which."}}},
    },
}
COLUMNS = ("family", "template", "one turn", "two turns", "thoughts", "tools", "supervised of the last answer")


def run(quick: bool) -> None:
    logging.getLogger("todi_offline").setLevel(logging.ERROR)  # the table says what the warnings do
    rows = [_row(name, text) for name, text in _templates()]
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    print("\n".join(lines))
    if not quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join([__doc__ or "", *lines, "", listed(environment()), ""]), encoding="utf-8")


def _templates() -> Iterator[tuple[str, str]]:
    for file in sorted(files("trl").joinpath("chat_templates").iterdir(), key=lambda file: file.name):
        name, _, ending = file.name.partition(".")
        if ending == "jinja" and not name.endswith("_training") and name not in OTHERS:
            yield name, file.read_text(encoding="utf-8")


def _row(name: str, template: str) -> list[str]:
    tokenizer = _tokenizer(template)
    one, two = _turns(1), _turns(2)
    origin, last = "own", ""
    try:
        examples = _examples(tokenizer, two)
        origin = "trl's" if examples.recipe["chat_template_from"] == "trl" else "own"
        last = _supervised(tokenizer, examples)[-1]
    except DataError as error:
        last = str(error)
    shown = f"`{last!r}`".replace("|", "\\|")
    return [name, origin, _said(tokenizer, one), _said(tokenizer, two), _thought(tokenizer), _called(tokenizer), shown]


def _said(tokenizer: Any, turns: Sequence[dict[str, Any]]) -> str:
    try:
        found = _supervised(tokenizer, _examples(tokenizer, turns))
    except DataError as error:
        return _refused(error)
    wanted = ANSWERS[: len(turns) // 2]
    if any(_SCAFFOLD.search(text) for text in found):
        return "supervises scaffolding"
    right = len(found) == len(wanted) and all(answer in text for answer, text in zip(wanted, found, strict=True))
    return "yes" if right else "wrong"


def _thought(tokenizer: Any) -> str:
    turns = _turns(2)
    for turn, thought in zip(turns[1::2], THOUGHTS, strict=True):
        turn["reasoning_content"] = thought
    try:
        examples = _examples(tokenizer, turns)
    except DataError as error:
        return _refused(error)
    first, last = (thought in text for thought, text in zip(THOUGHTS, _supervised(tokenizer, examples), strict=True))
    return "yes" if first and last else "last only" if last else "left out"


def _called(tokenizer: Any) -> str:
    question, answer = _turns(1)
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": "a pronoun"}
    try:
        found = _supervised(tokenizer, _examples(tokenizer, [question, calling, result, answer], tools=[TOOL]))
    except DataError as error:
        return _refused(error)
    right = len(found) == 2 and "lookup" in found[0] and ANSWERS[0] in found[1]
    return "yes" if right and not any("a pronoun" in text for text in found) else "wrong"


def _refused(error: DataError) -> str:
    return "refused: " + str(error).partition(": ")[2].partition(";")[0]


def _turns(num_turns: int) -> list[dict[str, Any]]:
    return [
        message
        for question, answer in zip(QUESTIONS[:num_turns], ANSWERS, strict=False)
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def _examples(tokenizer: Any, messages: Sequence[dict[str, Any]], **row: Any) -> Examples:
    return examples_from_rows([{"messages": list(messages), **row}], DataConfig(max_length=4096), tokenizer)


def _supervised(tokenizer: Any, examples: Examples) -> list[str]:
    """Return the stretches of supervised text."""
    ids, mask = examples[0].token_ids, np.array([False, *examples[0].target_mask[:-1]])
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop].tolist()) for start, stop in edges]


def _tokenizer(template: str) -> Any:
    """Return a tokenizer of bytes and of the special tokens that a template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = sorted({*_SPECIAL.findall(template), "<bos>", "<eos>"})
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>") if token in template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )
