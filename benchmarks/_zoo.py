"""The name of a family of models in, a tiny random model of it out, with what sets the family apart.

Each model has four layers, or as many as show all its kinds of layers. Its windows and chunks are shorter than the
sequences that it reads. Its weights are so large that distributions are far from flat.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from todi_offline.student.composed import decoder_layers
from todi_offline.student.masked import Kept
from todi_offline.student.parts import WidthParts

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 8}
_PER_LAYER: dict[str, Any] = {
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
_PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_FEW = _EXPERTS | {"num_experts": 4}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "head_dim": 4, "rope_interleave": True}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "llama": ("dense", {"tie_word_embeddings": False}),
    "mistral": ("dense, window", _WINDOW),
    "ministral": ("dense, window", _WINDOW | _HEADS),
    "qwen2": ("dense, window", _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("dense, window", _HEADS | _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "gemma": ("dense, tied", _HEADS),
    "gemma2": ("dense, window, soft cap", _HEADS | _WINDOW | {"final_logit_softcapping": 2.0}),
    "gemma3_text": ("dense, window", _HEADS | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3n_text": (
        "dense, window, embeddings by layer",
        _HEADS | _WINDOW | _PER_LAYER | {"activation_sparsity_pattern": None},
    ),
    "gemma4_text": ("dense, window, unlike heads", _HEADS | _WINDOW | _PER_LAYER | {"global_head_dim": 16}),
    "phi": ("dense, head with bias", {}),
    "phi3": ("dense, window", _WINDOW),
    "olmo": ("dense", {}),
    "olmo2": ("dense", {}),
    "olmo3": ("dense, window", _WINDOW),
    "granite": ("dense, scaled head", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 4.0}),
    "cohere": ("dense, scaled head, tied", {"logit_scale": 0.25}),
    "cohere2": ("dense, window, scaled head", _WINDOW | {"logit_scale": 0.25, "sliding_window_pattern": 2}),
    "smollm3": ("dense, layers without positions", {"no_rope_layers": [1, 0, 1, 1]}),
    "glm": ("dense", _HEADS),
    "glm4": ("dense", _HEADS),
    "nemotron": ("dense", {}),
    "starcoder2": ("dense, window", _WINDOW),
    "stablelm": ("dense", {}),
    "ernie4_5": ("dense", _HEADS),
    "hunyuan_v1_dense": ("dense", _HEADS),
    "exaone4": ("dense, window", _HEADS | _WINDOW | {"sliding_window_pattern": 2}),
    "seed_oss": ("dense", _HEADS),
    "arcee": ("dense", {}),
    "apertus": ("dense", {}),
    "helium": ("dense", _HEADS),
    "diffllama": ("dense", {}),
    "bitnet": ("dense", {}),
    "nanochat": ("dense, soft cap", {}),
    "vaultgemma": ("dense, window, soft cap", _HEADS | _WINDOW),
    "gpt2": ("dense, learned positions", {}),
    "gpt_neo": ("dense, window", {"attention_types": [[["global", "local"], 2]], "window_size": 8}),
    "gpt_neox": ("dense", {}),
    "gptj": ("dense, head with bias", {"rotary_dim": 4}),
    "gpt_bigcode": ("dense, one key head", {}),
    "opt": ("dense, learned positions", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "biogpt": ("dense, learned positions", {}),
    "bloom": ("dense, alibi", {}),
    "mpt": ("dense, alibi", {}),
    "falcon": ("dense", {}),
    "persimmon": ("dense", {}),
    # mixtures of experts
    "mixtral": ("experts, window", _WINDOW | {"num_local_experts": 4}),
    "qwen2_moe": ("experts", _FEW | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}),
    "qwen3_moe": ("experts and dense layers", _HEADS | _FEW | {"mlp_only_layers": [1]}),
    "olmoe": ("experts", _FEW),
    "phimoe": ("experts, head with bias", _WINDOW | {"num_local_experts": 4, "lm_head_bias": True}),
    "granitemoe": ("experts, scaled head", {"num_local_experts": 4, "logits_scaling": 3.0}),
    "deepseek_v3": ("experts, latent attention", _LATENT | _ROUTED | {"first_k_dense_replace": 1}),
    "glm4_moe": ("experts", _HEADS | _ROUTED | {"first_k_dense_replace": 1}),
    "ernie4_5_moe": ("experts", _HEADS | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "hunyuan_v1_moe": ("experts", _HEADS | {"num_experts": 4, "moe_topk": 2}),
    "gpt_oss": ("experts, window, sinks", _HEADS | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "experts and dense layers, chunks",
        _HEADS
        | {"num_local_experts": 4, "attention_chunk_size": 8, "intermediate_size_mlp": 64}
        | {"moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 1]},
    ),
    "minimax_m2": ("experts", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # state spaces, linear attention, and hybrids of them
    "mamba": ("state space", {"state_size": 8}),
    "mamba2": ("state space", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "falcon_mamba": ("state space", {"state_size": 8}),
    "falcon_h1": (
        "attention beside state space, scaled head",
        _HEADS | _MAMBA2 | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    ),
    "jamba": (
        "hybrid, experts",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4} | {"mamba_d_state": 8},
    ),
    "bamba": ("hybrid", _MAMBA2 | {"attn_layer_indices": [1, 3]}),
    "zamba2": (
        "hybrid, shared blocks",
        {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "chunk_size": 16, "adapter_rank": 8},
    ),
    "granitemoehybrid": ("hybrid, experts, scaled head", _MAMBA2 | _MIXED | {"num_local_experts": 4}),
    "nemotron_h": (
        "hybrid, experts",
        _MAMBA2
        | {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "head_dim": 8,
        }
        | _ROUTED
        | {"moe_shared_expert_intermediate_size": 16},
    ),
    "recurrent_gemma": (
        "hybrid, window, soft cap",
        {"attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "lfm2": (
        "convolutions and attention",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "minimax": ("linear attention, experts", _HEADS | {"num_local_experts": 4, "block_size": 16}),
    "qwen3_next": (
        "linear attention, experts",
        _HEADS | _FEW | _LINEAR | _MIXED | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3_5_text": ("linear attention", _HEADS | _LINEAR | _MIXED),
    "rwkv": ("recurrent", {}),
    "xlstm": ("recurrent, soft cap", {"num_heads": 4}),
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**COMMON | FAMILIES[family][1] | changes)


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a float32 model in evaluation mode, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


@torch.no_grad()
def logits_of_layers(model: PreTrainedModel, kept: Sequence[int], tokens: Tensor) -> Tensor:
    """Return the logits of a model when hidden states go round the other layers than these, which rise."""
    name = decoder_layers(model)

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    others = [layer for number, layer in enumerate(model.get_submodule(name)) if number not in kept]
    handles = [layer.register_forward_hook(skip, with_kwargs=True) for layer in others]
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def logits_of_parts(model: PreTrainedModel, parts: WidthParts, kept: Kept, tokens: Tensor) -> Tensor:
    """Return the logits of a copy of a model with 0 for the weights of all that is not kept.

    A norm reads the kept channels several times over, so their number has to divide the model's.
    """
    copied = copy.deepcopy(model)
    times = parts.sizes.hidden // len(kept.hidden)
    for name in parts.norms:
        norm: Any = copied.get_submodule(name)
        for value in norm.parameters():
            value.copy_(value[kept.hidden].repeat(times))
        norm.register_forward_pre_hook(lambda _, args: (args[0][..., kept.hidden].repeat(1, 1, times),))
        norm.register_forward_hook(
            lambda _, __, out: torch.zeros_like(out).index_copy(-1, kept.hidden, out[..., : len(kept.hidden)])
        )
    _zero_others(copied.get_submodule(parts.embedding).weight, 1, kept.hidden)
    for number, layer in enumerate(parts.layers):
        dims = torch.arange(parts.sizes.head_dim)
        columns = (kept.heads[number][:, None] * parts.sizes.head_dim + dims).flatten()
        for module, read in ((f"{layer.attention}.o_proj", columns), (f"{layer.mlp}.down_proj", kept.neurons[number])):
            linear: Any = copied.get_submodule(module)
            _zero_others(linear.weight, 1, read)
            _zero_others(linear.weight, 0, kept.hidden)
            if linear.bias is not None:
                _zero_others(linear.bias, 0, kept.hidden)
    logits: Tensor = copied(input_ids=tokens, use_cache=False).logits
    return logits


def _zero_others(weight: Tensor, axis: int, kept: Tensor) -> None:
    others = torch.ones(weight.shape[axis], dtype=torch.bool).index_fill(0, kept, False)
    weight.index_fill_(axis, others.nonzero()[:, 0], 0)
