"""A folder in, two teachers in it out, whose paths are printed as JSON: SmolLM2-135M-Instruct, and a tiny random Llama.

Runs in the environment of vLLM, so that its transformers can read what is written.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from todi_offline.commands.demo import fetch_teacher
from todi_offline.models.loading import load_model, load_tokenizer


def main(folder: Path, smollm2: str) -> dict[str, str]:
    """Write what is not there yet."""
    source = smollm2 or str(fetch_teacher())
    if source.endswith(".gguf"):
        smollm2 = str(folder / "smollm2")
        load_model(source, dtype="float32", device="cpu").save_pretrained(smollm2)
        load_tokenizer(source).save_pretrained(smollm2)
    tokenizer = load_tokenizer(smollm2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM has kernels for on a CPU
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    return {"random": str(folder / "random"), "smollm2": smollm2}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
