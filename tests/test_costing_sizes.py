"""The size of a model, read from the headers of its files."""

from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from support.tiny_models import VOCAB, gpt2, llama, save, save_llama
from torch.utils.flop_counter import FlopCounterMode

from todi_offline.costing.sizes import read_size
from todi_offline.errors import ModelError


def num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "tables"),
    [(llama(), 2), (llama(tie_word_embeddings=True), 1), (gpt2(n_positions=256), 1)],
    ids=["llama", "tied", "gpt2"],
)
def test_the_headers_have_the_parameters_of_the_model(model: Any, tables: int, tmp_path: Path) -> None:
    size = read_size(str(save(model, tmp_path)), VOCAB)
    assert size.num_parameters == num_parameters(model)
    assert size.num_head_parameters == 32 * VOCAB
    assert size.num_body_parameters == num_parameters(model) - tables * 32 * VOCAB
    assert (size.num_layers, size.hidden_size, size.dtype) == (2, 32, "float32")
    assert size.weight_bytes() == size.file_bytes == 4 * num_parameters(model)
    assert size.weight_bytes("bfloat16") == 2 * num_parameters(model)


def test_weights_in_several_files_and_in_bfloat16_are_added_up(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    size = read_size(str(tmp_path), VOCAB)
    assert (size.num_parameters, size.dtype) == (num_parameters(model), "bfloat16")
    assert size.weight_bytes() == size.file_bytes == 2 * num_parameters(model)


def test_the_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    model, num_tokens = llama(), 48
    size = read_size(str(save(model, tmp_path)), VOCAB)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    ours = size.forward_flops(np.array([num_tokens]), num_tokens)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)
    fewer = size.forward_flops(np.array([num_tokens]), 0)
    assert ours - fewer == 2 * 32 * VOCAB * num_tokens


def test_a_model_without_headers_is_built_without_memory(tmp_path: Path) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert read_size(str(tmp_path), VOCAB).num_parameters == num_parameters(model)


def test_a_gguf_file_is_sized_as_the_model_it_becomes(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    tensors = {"token_embd.weight": (VOCAB, 32), "blk.0.ffn_up.weight": (64, 32), "blk.1.ffn_up.weight": (64, 32)}
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = read_size(str(file), VOCAB)
    assert (size.num_parameters, size.num_body_parameters) == (VOCAB * 32 + 2 * 64 * 32, 2 * 64 * 32)
    assert (size.num_layers, size.hidden_size, size.dtype) == (2, 32, "float32")
    assert size.weight_bytes() == 2 * size.file_bytes


def test_a_model_of_the_hub_is_read_from_the_files_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_llama(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert read_size("some/model", VOCAB) == read_size(str(folder), VOCAB)


def test_a_model_of_the_hub_that_is_not_here_cannot_be_read_offline() -> None:
    with pytest.raises(ModelError, match="the headers of some/model cannot be fetched from the hub"):
        read_size("some/model", VOCAB)


def test_a_mixture_of_experts_is_recognised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.layers.0.mlp.experts.0.w": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert read_size(str(tmp_path), VOCAB).has_experts


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        read_size(str(tmp_path), VOCAB)
    (tmp_path / "tiny.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"the headers of .*tiny\.gguf cannot be read"):
        read_size(str(tmp_path / "tiny.gguf"), VOCAB)
