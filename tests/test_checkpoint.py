"""The fingerprint of a checkpoint comes from its files, wherever they are and however they are split."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import gemma2, llama, save

from todi_offline.errors import ModelError
from todi_offline.models import checkpoint
from todi_offline.models.checkpoint import checkpoint_fingerprint, identity_of_adapter, identity_of_config, locate


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "todi_offline" / "fingerprints"


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def changed(found: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    return {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}


def test_the_fingerprint_has_the_kind_and_size_of_the_model(saved: Path) -> None:
    found = checkpoint_fingerprint(str(saved))
    assert found["identified_by"] == "files"
    assert found["model_type"] == "llama"
    assert found["num_parameters"] == sum(weight.numel() for weight in llama().parameters())
    assert found["sampled_tensors"] == []
    assert found["adapters"] == {}
    json.dumps(found)


def test_a_copy_has_the_same_fingerprint_and_so_has_one_in_shards(saved: Path, tmp_path: Path) -> None:
    expected = checkpoint_fingerprint(str(saved))
    assert checkpoint_fingerprint(str(copied(saved, tmp_path / "copy"))) == expected
    llama().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert checkpoint_fingerprint(str(tmp_path / "shards")) == expected


def test_one_changed_weight_or_setting_is_another_model(saved: Path, tmp_path: Path) -> None:
    expected = checkpoint_fingerprint(str(saved))
    folder = copied(saved, tmp_path / "weight")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert changed(checkpoint_fingerprint(str(folder)), expected) == {"weights"}
    folder = copied(saved, tmp_path / "setting")
    config = json.loads((folder / "config.json").read_text())
    for other, names in (
        ({"dtype": "bfloat16", "transformers_version": "9"}, set()),
        ({"rms_norm_eps": 1}, {"config"}),
    ):
        (folder / "config.json").write_text(json.dumps(config | other))
        assert changed(checkpoint_fingerprint(str(folder)), expected) == names


def test_files_are_read_once_until_they_change(
    saved: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved, tmp_path / "copy")
    expected = checkpoint_fingerprint(str(folder))
    assert len(list(home.iterdir())) == 1

    def refuse(*_: Any) -> str:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_hash", refuse)
        assert checkpoint_fingerprint(str(folder)) == expected
        file = folder / "model.safetensors"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(AssertionError, match="read again"):
            checkpoint_fingerprint(str(folder))
    assert checkpoint_fingerprint(str(folder)) == expected
    for kept in home.iterdir():
        kept.write_text("{")
    assert checkpoint_fingerprint(str(folder)) == expected


def test_a_fingerprint_that_cannot_be_kept_is_computed(saved: Path, home: Path) -> None:
    home.parent.mkdir(parents=True)
    home.touch()
    assert checkpoint_fingerprint(str(saved))["model_type"] == "llama"


def test_large_tensors_are_sampled_and_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAMPLED_TENSOR_BYTES", 16_384)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 512)
    expected = checkpoint_fingerprint(str(saved))
    assert expected["sampled_tensors"] == ["lm_head.weight", "model.embed_tokens.weight"]
    for row in (0, -1):
        model = llama()
        with torch.no_grad():
            model.lm_head.weight[row, row] += 1
        model.save_pretrained(tmp_path / str(row))
        assert changed(checkpoint_fingerprint(str(tmp_path / str(row))), expected) == {"weights"}


def adapted(folder: Path, seed: int = 0, r: int = 4) -> Path:
    torch.manual_seed(seed)
    settings = LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), settings)
    model.peft_config["default"].base_model_name_or_path = str(folder.parent / "base")
    model.save_pretrained(folder)
    return folder


def test_an_adapter_belongs_to_the_fingerprint(saved: Path, tmp_path: Path) -> None:
    plain = checkpoint_fingerprint(str(saved))
    copied(saved, tmp_path / "base")  # which the adapter names, so that transformers loads it too
    first, other, wider = (adapted(tmp_path / str(n), n % 2, 4 + n // 2) for n in range(3))
    found = checkpoint_fingerprint(str(saved), str(first))
    assert changed(found, plain) == {"adapters"}
    assert checkpoint_fingerprint(str(saved), str(copied(first, tmp_path / "copy"))) == found
    assert checkpoint_fingerprint(str(saved), str(other)) != found
    assert checkpoint_fingerprint(str(saved), str(wider)) != found
    assert checkpoint_fingerprint(str(first)) == found


def test_checkpoints_of_pickles_are_known_too(saved: Path, tmp_path: Path) -> None:
    for name, change in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        folder = copied(saved, tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][0] += change
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    found, same, other = (checkpoint_fingerprint(str(tmp_path / name)) for name in "abc")
    assert found == same
    assert changed(found, other) == {"weights"}
    assert "num_parameters" not in found


def gguf_file(file: Path, value: float = 1.0, width: int = 32) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_embedding_length(width)
    writer.add_tensor("token_embd.weight", np.full((8, 32), value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_known_by_its_tensors_and_its_header(tmp_path: Path) -> None:
    expected = checkpoint_fingerprint(str(gguf_file(tmp_path / "a.gguf")))
    assert (expected["model_type"], expected["num_parameters"]) == ("llama", 256)
    assert checkpoint_fingerprint(str(gguf_file(tmp_path / "b.gguf"))) == expected
    assert changed(checkpoint_fingerprint(str(gguf_file(tmp_path / "c.gguf", value=2.0))), expected) == {"weights"}
    assert changed(checkpoint_fingerprint(str(gguf_file(tmp_path / "d.gguf", width=64))), expected) == {"config"}


def test_a_hub_id_is_found_in_the_local_hub_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache of huggingface_hub has it: names that link to blobs."""
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(saved / name, repository / "blobs" / str(number))
        (snapshot / name).symlink_to(repository / "blobs" / str(number))
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert checkpoint_fingerprint("someone/tiny") == checkpoint_fingerprint(str(saved))
    with pytest.raises(ModelError, match="someone/else"):
        checkpoint_fingerprint("someone/else")


def test_a_path_without_a_checkpoint_is_named(saved: Path, tmp_path: Path) -> None:
    def broken(name: str) -> str:
        return str(copied(saved, tmp_path / name))

    with pytest.raises(ModelError, match="there is no folder"):
        checkpoint_fingerprint(str(tmp_path / "nothing"))
    Path(broken("a"), "config.json").unlink()
    with pytest.raises(ModelError, match=r"a has no config.json"):
        checkpoint_fingerprint(str(tmp_path / "a"))
    Path(broken("b"), "model.safetensors").unlink()
    with pytest.raises(ModelError, match="b has no weights"):
        checkpoint_fingerprint(str(tmp_path / "b"))
    file = Path(broken("c"), "model.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match=r"c cannot be read as a checkpoint: .* ends before"):
        checkpoint_fingerprint(str(tmp_path / "c"))
    Path(broken("d"), "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ModelError, match="d cannot be read as a checkpoint"):
        checkpoint_fingerprint(str(tmp_path / "d"))
    with pytest.raises(ModelError, match="no adapter_config"):
        checkpoint_fingerprint(str(saved), str(saved))
    llama().save_pretrained(tmp_path / "e", max_shard_size="40KB")
    next((tmp_path / "e").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"e lacks model-.*, which its index names"):
        checkpoint_fingerprint(str(tmp_path / "e"))


def test_an_adapters_identity_depends_neither_on_the_order_of_modules_nor_on_folders() -> None:
    here = {"r": 4, "target_modules": {"q_proj", "k_proj"}, "base_model_name_or_path": "/here"}
    there = {"r": 4, "target_modules": ["k_proj", "q_proj"], "base_model_name_or_path": "/there"}
    assert identity_of_adapter(here) == identity_of_adapter(there) != identity_of_adapter(here | {"r": 8})


def test_configs_within_a_config_name_no_folder_either() -> None:
    inner = {"hidden_size": 8, "_name_or_path": "/here", "dtype": "float32", "id2label": {0: "a"}}
    outer = {"_name_or_path": "/here", "text_config": inner}
    there = {"_name_or_path": "/there", "text_config": inner | {"_name_or_path": "/there", "dtype": "bfloat16"}}
    kept = {"text_config": {"hidden_size": 8, "id2label": {0: "a"}}}
    assert identity_of_config(outer) == identity_of_config(there) == kept
    assert identity_of_config(outer) != identity_of_config({"text_config": inner | {"hidden_size": 9}})


def test_a_tied_model_in_bfloat16_is_known(tmp_path: Path) -> None:
    save(gemma2().bfloat16(), tmp_path / "model")
    assert checkpoint_fingerprint(str(tmp_path / "model"))["model_type"] == "gemma2"


def test_paths_are_told_from_hub_ids(saved: Path, tmp_path: Path) -> None:
    assert locate(str(saved)) == saved
    assert locate("someone/model") is None
    with pytest.raises(ModelError, match="there is no folder"):
        locate("./nothing")
    with pytest.raises(ModelError, match=r"there is no file .*none\.gguf"):
        locate(str(tmp_path / "none.gguf"))


def test_no_model_is_loaded(saved: Path) -> None:
    import subprocess

    code = "import sys; from todi_offline.models.checkpoint import *; checkpoint_fingerprint(sys.argv[1])"
    command = [sys.executable, "-c", f"{code}; assert not {{'torch', 'transformers'}} & sys.modules.keys()", str(saved)]
    subprocess.run(command, check=True)


def with_code(folder: Path, **modules: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "its_config.Its", "AutoModelForCausalLM": "its_model.Its", "AutoTokenizer": ["t.T", None]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    code = {
        "its_config": "class Its: ...",
        "its_model": "from .its_config import Its\nfrom .its_layers import Layer\n",
        "its_layers": "from .inner.its_kernel import run\n",
        "inner/its_kernel": "def run(): return 1\n",
        "convert_weights": "",
    }
    (folder / "inner").mkdir()
    for name, text in (code | modules).items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_trusted_code_that_comes_with_a_model_belongs_to_the_fingerprint(saved: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, *, trust: bool = True, **modules: str) -> dict[str, Any]:
        folder = with_code(copied(saved, tmp_path / name), **modules)
        return checkpoint_fingerprint(str(folder), trust_remote_code=trust)

    expected = fingerprint("a")
    assert fingerprint("b") == expected
    assert changed(fingerprint("c", trust=False), expected) == {"code"}
    for name in ("its_config", "its_model", "its_layers", "inner/its_kernel"):
        assert changed(fingerprint(name, **{name: "class Its: other = 1"}), expected) == {"code"}
    assert fingerprint("d", convert_weights="never imported") == expected
    (tmp_path / "a" / "inner" / "its_kernel.py").write_text("def run(): return 2\n")  # though the rest is kept
    assert changed(checkpoint_fingerprint(str(tmp_path / "a"), trust_remote_code=True), expected) == {"code"}


def test_the_fingerprint_of_a_model_without_code_is_the_same_whether_code_is_trusted(saved: Path) -> None:
    expected = checkpoint_fingerprint(str(saved))
    assert checkpoint_fingerprint(str(saved), trust_remote_code=True) == expected
    assert expected.keys().isdisjoint({"code"})
