"""Loading models and tokenizers, devices, dtypes and evaluation mode."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, llama, save, save_llama
from torch import Tensor

from todi_offline.errors import ModelError
from todi_offline.models.loading import (
    evaluation_mode,
    load_model,
    load_tokenizer,
    real_vocab_size,
    resolve_device,
    resolve_dtype,
)

TOKENS = torch.arange(3, 43).view(2, 20)


def full_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1)


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model = llama()
    loaded = load_model(str(save(model, tmp_path)), device="cpu")
    torch.testing.assert_close(full_logits(loaded), full_logits(model), rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()
    assert load_model(str(tmp_path), dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_a_gguf_file_in_half_precision_is_the_model_that_its_folder_would_be(tmp_path: Path) -> None:
    """Its rotary frequencies are not rounded: positions are the same far into a text."""
    gguf_of(llama(hidden_size=64, head_dim=16), tmp_path / "tiny.gguf")
    model = load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "folder")
    saved = load_model(str(tmp_path / "folder"), dtype="bfloat16", device="cpu")
    tokens = torch.arange(500)[None]
    with torch.no_grad():
        found, expected = (each(input_ids=tokens, use_cache=False).logits for each in (model, saved))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def gguf_of(model: Any, file: Path) -> None:
    """Write a Llama as a GGUF file. Its queries and keys are not permuted, so it is another model."""
    config, writer = model.config, GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([str(number) for number in range(config.vocab_size)])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=r"model has no tokenizer that can be loaded .*save the teacher's tokenizer"):
        load_tokenizer(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty cannot be loaded as a causal language model"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"there is no folder .*nothing; name a folder with a model"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"there is no folder nothing/; name a folder with a model"):
        load_tokenizer("nothing/")
    with pytest.raises(ModelError, match=r"nothing has no tokenizer .*; check the name: no such folder exists"):
        load_tokenizer("nothing")
    with pytest.raises(ModelError, match=r"there is no file .*missing\.gguf"):
        load_model(str(tmp_path / "missing.gguf"))


def test_the_real_vocabulary_has_the_ids_that_tokenizer_and_head_share(caplog: pytest.LogCaptureFixture) -> None:
    """What lies beyond in the head is padding; what lies beyond in the tokenizer, as in Gemma 3's, has no logit."""
    assert real_vocab_size(tiny_tokenizer(), VOCAB + 64) == real_vocab_size(tiny_tokenizer(), VOCAB) == VOCAB
    assert not caplog.text
    assert real_vocab_size(tiny_tokenizer(), VOCAB - 1) == VOCAB - 1
    assert "the tokenizer knows 512 ids, but the model's head has only 511; an example with a later id" in caplog.text


def test_devices_and_dtypes_go_by_their_names() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("auto") == "auto"
    with pytest.raises(ModelError, match="device 'gpu' is unknown"):
        resolve_device("gpu")
    with pytest.raises(ModelError, match=r"device 'cuda:99' cannot be used here \(.*\); use auto or cpu"):
        resolve_device("cuda:99")
    for name in ("float31", "int64", "nn"):
        with pytest.raises(ModelError, match=f"dtype '{name}' is unknown"):
            resolve_dtype(name)


def test_evaluation_mode_is_left_as_it_was_found() -> None:
    model = llama().train()
    with evaluation_mode(model):
        assert not model.training
        assert not full_logits(model).requires_grad
    assert model.training


def test_a_device_is_refused_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ModelError, match="device 'tpu' is unknown"):
        load_model(str(tmp_path), device="tpu")
