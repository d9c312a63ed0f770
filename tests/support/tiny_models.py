"""Small models for the tests: random weights from a seed, saved with the tiny tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from support.tiny import tiny_tokenizer

VOCAB = 512
"""Ids of the tiny tokenizer."""

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Weights this large give distributions that are far from flat."""


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a float32 model in evaluation mode, with random weights from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(LlamaConfig(**(DECODER | changes)), seed)


def gpt2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    values |= {"bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2}
    values |= {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    return build(GPT2Config(**(values | changes)), seed)


def gemma2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Its soft cap of 2 is so low that forgetting it gives very different logits."""
    values = DECODER | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 64}
    return build(Gemma2Config(**(values | changes)), seed)


def granite(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(GraniteConfig(**(DECODER | {"logits_scaling": 3.0} | changes)), seed)


def cohere(seed: int = 0, **changes: Any) -> PreTrainedModel:
    values = DECODER | {"logit_scale": 0.25, "tie_word_embeddings": True}
    return build(CohereConfig(**(values | changes)), seed)


def mamba(seed: int = 0) -> PreTrainedModel:
    """Its recurrent state runs through the whole row, so packed sequences are not isolated."""
    values = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return build(MambaConfig(**values, bos_token_id=0, eos_token_id=2, pad_token_id=0), seed)


def save(model: PreTrainedModel, folder: Path, *, chat: bool = True) -> Path:
    """Save a model with the tiny tokenizer; return the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny Llama with the tiny tokenizer; return the folder."""
    return save(llama(seed, **changes), folder)
