"""The chat templates of real model families from trl, with tokenizers that have their special tokens."""

import copy
import functools
import re
from importlib.resources import files

from transformers import AddedToken, PreTrainedTokenizerFast

from support.tiny import tiny_tokenizer

OTHERS = ("diffusion_gemma", "idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm")
"""Templates for images, or of models that are not causal language models."""

TEMPLATES = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in sorted(files("trl").joinpath("chat_templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja") and not file.name.endswith("_training.jinja")
}
FAMILIES = [name for name in TEMPLATES if name not in OTHERS]

BOUNDS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
}
"""BOS and EOS of a family, by the beginning of its name."""

_SPECIAL = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜<>']+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens that a family adds and that are not special."""


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with the family's template and all tokens that the template writes."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> PreTrainedTokenizerFast:
    template = TEMPLATES[name]
    bos, eos = next(bounds for start, bounds in BOUNDS.items() if name.startswith(start))
    tokenizer = tiny_tokenizer()
    special = {*_SPECIAL.findall(template), eos, *([bos] if bos else [])}
    tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(special)], True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _PLAIN if token in template])
    tokenizer.chat_template = template
    return tokenizer
