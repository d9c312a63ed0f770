"""`evaluate`: distance and ROUGE-L in one call, its settings, its files and its refusals."""

import json
from pathlib import Path

import pytest
from support.tiny import tiny_tokenizer
from support.tiny_models import llama, save

from todi_offline.cache.reader import Cache
from todi_offline.errors import CacheFormatError, CacheMismatchError, ConfigError, DataError, ModelError
from todi_offline.evaluation import EvaluateConfig, evaluate
from todi_offline.student import LoraSettings, add_lora

QUICK = {"device": "cpu", "limit": 3, "max_new_tokens": 4, "seeds": (10, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(seed=1), tmp_path_factory.mktemp("student"))


def test_distance_and_rouge_are_measured_and_written(folder: Path, heldout: Cache, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores"
    seen = []
    summary = evaluate(
        str(folder), cache=heldout, data="stdlib", out=out, progress=lambda *at: seen.append(at), **QUICK
    )
    assert summary.distance is not None
    assert summary.generation is not None
    assert summary.distance.num_sequences == summary.generation.num_prompts == 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["distance"]["overall"]["measures"]["forward_kl"]["mean"] == (
        summary.distance.overall.measures["forward_kl"].mean
    )
    assert metrics["generation"]["rouge_l_by_run"] == summary.generation.rouge_l_by_run
    assert metrics["config"]["seeds"] == [10, 20]
    assert metrics["config"]["max_prompt_length"] == 256
    assert sorted(file.name for file in out.iterdir()) == [
        "metrics.json",
        "predictions-10.jsonl",
        "predictions-20.jsonl",
    ]
    assert seen == [(3, 3), (3, 6), (6, 6)]


def test_each_can_be_measured_alone_and_nothing_is_written_without_out(
    folder: Path, heldout: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(str(folder), cache=heldout, **QUICK).generation is None
    assert evaluate(str(folder), data="stdlib", greedy=True, **QUICK).distance is None
    assert not list(tmp_path.iterdir())


def test_a_loaded_student_gives_the_same_results_as_its_folder(folder: Path, heldout: Cache) -> None:
    named = evaluate(str(folder), cache=heldout, data="stdlib", **QUICK)
    loaded = evaluate(llama(seed=1), tokenizer=tiny_tokenizer(), cache=heldout, data="stdlib", **QUICK)
    assert loaded == named
    with pytest.raises(ModelError, match="needs its tokenizer"):
        evaluate(llama(seed=1), cache=heldout, **QUICK)


def test_a_folder_of_lora_adapters_is_a_student(folder: Path, heldout: Cache, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), LoraSettings(lora_r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    adapted = evaluate(str(tmp_path), cache=heldout, **QUICK)
    assert adapted == evaluate(model, tokenizer=tiny_tokenizer(), cache=heldout, **QUICK)
    assert adapted != evaluate(str(folder), cache=heldout, **QUICK)


def test_a_toml_file_gives_the_same_results_as_settings(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "evaluate.toml"
    file.write_text(f'student = "{folder}"\ndata = "stdlib"\ndevice = "cpu"\nlimit = 9\nmax_new_tokens = 4\n')
    written = evaluate(config=file, limit=3, seeds=(10, 20))
    assert written == evaluate(str(folder), data="stdlib", **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"nothing to evaluate on; name a held-out cache \(--cache\), a data set \(--data\) or both"),
        ({"data": "stdlib", "batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"data": "stdlib", "limit": 0}, "limit is 0; expected 1 or more"),
        ({"data": "stdlib", "max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"data": "stdlib", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"data": "stdlib", "no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; expected 0 or more"),
        ({"data": "stdlib", "seeds": (1, 1)}, r"seeds are \(1, 1\); expected one or more, each once"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(student="s", **settings)


def test_a_student_cache_or_data_set_that_cannot_be_used_is_named(folder: Path, heldout: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="is not a cache"):
        evaluate(str(folder), cache=tmp_path, **QUICK)
    with pytest.raises(ModelError, match="there is no folder"):
        evaluate(str(tmp_path / "nothing"), cache=heldout, **QUICK)
    with pytest.raises(DataError, match="there is no file or folder"):
        evaluate(str(folder), data=str(tmp_path / "no.jsonl"), **QUICK)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file; name a folder for the results \(--out\)"):
        evaluate(str(folder), cache=heldout, out=tmp_path / "file", **QUICK)
    other = save(llama(seed=1), tmp_path / "other", chat=False)
    with pytest.raises(CacheMismatchError, match="special_ids"):
        evaluate(str(other), cache=heldout, **QUICK)
    with pytest.raises(ConfigError, match=r"unknown setting 'sedes'; did you mean 'seeds'"):
        evaluate(str(folder), cache=heldout, sedes=(1,))
