"""Stage 2 from end to end: settings come in; a trained student on the disk goes out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Row, tokenised
from peft import PeftModel
from support.tiny import CHATML, tiny_tokenizer
from support.tiny_models import llama, save
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import DataConfig, load_examples
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.errors import (
    CacheFormatError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigError,
    ModelError,
    TargetsError,
)
from todi_offline.teacher.in_transformers import Teacher, as_teacher
from todi_offline.training.run import TrainSummary, load_train_config, train, training_arguments
from todi_offline.training.selected import SelectedData, select_data

SMALL: dict[str, Any] = {
    "use_cpu": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student."""
    return save(llama(seed=1), tmp_path_factory.mktemp("student"))


def test_a_student_is_trained_measured_and_saved(folder: Path, cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    summary = train(str(folder), cache.root, tmp_path / "run", eval_cache=heldout.root, max_steps=6, **SMALL)
    assert summary.num_steps == 6
    assert summary.num_tokens == int(cache.num_tokens.sum())
    assert summary.seconds > 0
    for name in ("loss", "forward_kl", "reverse_kl", "cross_entropy", "kd"):
        assert 0 < summary.after[name] < summary.before[name], name
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not torch.equal(trained.lm_head.weight, llama(seed=1).lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tiny_tokenizer().get_vocab()
    again = train(str(tmp_path / "run"), cache, tmp_path / "more", eval_cache=heldout, max_steps=1, **SMALL)
    assert again.before["forward_kl"] == pytest.approx(summary.after["forward_kl"], rel=1e-5)


def test_a_student_is_saved_with_the_chat_template_of_its_data(
    folder: Path, teacher: Teacher, conversations: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A different template of the student is only reported, and the data are found with the recorded template."""
    rows, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations[:6]))
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    settings = {"k": 8, "tail_samples": 0, "max_length": 96, "chat_template": template, "supervise": "last"}
    capture(teacher, str(rows), cache, **settings)
    assert open_cache(cache).manifest.parts[0].recipe["chat_template"] == template
    caplog.set_level("WARNING", "todi_offline")
    train(str(folder), cache, tmp_path / "run", data=str(rows), max_steps=1, **SMALL)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == template
    assert "the student's chat template differs from the cache's" in caplog.text
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


def test_the_resolved_settings_are_saved_with_the_student(folder: Path, cache: Cache, tmp_path: Path) -> None:
    train(str(folder), cache.root, tmp_path / "run", max_steps=1, beta=2.0, temperature=2.0, lora_r=2, **SMALL)
    saved = json.loads((tmp_path / "run" / "todi_config.json").read_text())
    assert saved["distillation"]["beta"] == 2.0
    assert saved["distillation"]["kd_weight"] == 0.5
    assert saved["lora"]["lora_r"] == 2
    assert saved["trainer"] == SMALL | {"max_steps": 1}
    assert (saved["student"]["student"], saved["cache"]) == (str(folder), [cache.root])


def test_an_opened_cache_and_a_loaded_model_give_the_same_student(
    folder: Path, cache: Cache, heldout: Cache, tmp_path: Path
) -> None:
    named = train(str(folder), cache.root, tmp_path / "a", eval_cache=heldout.root, max_steps=3, **SMALL)
    given = train(
        llama(seed=1), cache, tmp_path / "b", eval_cache=heldout, tokenizer=tiny_tokenizer(), max_steps=3, **SMALL
    )
    assert given.after["forward_kl"] == named.after["forward_kl"]
    assert given.train_loss == named.train_loss
    with pytest.raises(ModelError, match="needs processing_class"):
        train(llama(seed=1), cache, tmp_path / "c", max_steps=3, **SMALL)


def test_a_toml_file_gives_the_same_student_as_settings(
    folder: Path, cache: Cache, heldout: Cache, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'out = "{tmp_path / "a"}"\ncache = "{cache.root}"\neval_cache = "{heldout.root}"\n'
        f'[student]\nstudent = "{folder}"\n[distillation]\ndivergence = "jeffreys"\nkd_weight = 0.7\n'
        "[trainer]\nmax_steps = 9\nuse_cpu = true\nsave_strategy = 'no'\n"
        "per_device_train_batch_size = 4\nlearning_rate = 1e-2\n"
    )
    written = train(config=file, max_steps=2)
    settings = SMALL | {"divergence": "jeffreys", "kd_weight": 0.7, "max_steps": 2}
    said = train(str(folder), cache.root, tmp_path / "b", eval_cache=heldout.root, **settings)
    assert written.num_steps == 2
    assert written.after["loss"] == said.after["loss"]


def test_lora_trains_and_saves_only_adapters(folder: Path, cache: Cache, tmp_path: Path) -> None:
    model = llama(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = {"lora_r": 4, "lora_target_modules": ["all-linear"]}
    train(model, cache, tmp_path / "run", tokenizer=tiny_tokenizer(), max_steps=3, **lora, **SMALL)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    worn = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run")
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(worn(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_adapters_follow_from_the_seed(folder: Path, cache: Cache, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.rand(1)  # whatever was drawn before
        train(str(folder), cache.root, tmp_path / name, max_steps=1, lora_r=2, seed=seed, data_seed=0, **SMALL)
    first, same, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def test_resuming_without_a_checkpoint_is_refused(folder: Path, cache: Cache, tmp_path: Path) -> None:
    for out in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"holds no checkpoint to resume; leave out resume"):
            train(str(folder), cache.root, out, resume=True, **SMALL)


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    settings = SMALL | {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    train(str(folder), cache.root, tmp_path / "whole", **settings)
    train(str(folder), cache.root, tmp_path / "parts", callbacks=[StopAfter(4)], **settings)
    train(str(folder), cache.root, tmp_path / "parts", resume=True, **settings)
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for found, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_an_argument_that_transformers_does_not_know_is_refused(folder: Path, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'lerning_rate'; did you mean 'learning_rate'\?"):
        train(str(folder), cache, tmp_path / "run", lerning_rate=0.1)
    with pytest.raises(ConfigError, match=r"unknown setting 'temprature'; did you mean 'temperature'\?"):
        train(str(folder), cache, tmp_path / "run", temprature=1.0)
    with pytest.raises(ConfigError, match=r"unknown setting 'zzz'; expected an option of `todi train --help`"):
        train(str(folder), cache, tmp_path / "run", zzz=1)
    with pytest.raises(ConfigError, match=r"transformers refuses these training arguments: tensorbord is not supp"):
        train(str(folder), cache, tmp_path / "run", report_to="tensorbord")
    with pytest.raises(ConfigError, match=r"transformers refuses these training arguments: .*sometimes"):
        train(str(folder), cache, tmp_path / "run", save_strategy="sometimes")
    assert not (tmp_path / "run").exists()


def test_a_cache_or_student_that_does_not_fit_is_refused_before_anything_is_written(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    other = save(llama(seed=1), tmp_path / "other", chat=False)
    run = tmp_path / "run"
    with pytest.raises(CacheMismatchError, match="special_ids"):
        train(str(other), cache, run, **SMALL)
    with pytest.raises(TargetsError, match=r"or capture 4 too"):
        train(str(folder), cache, run, temperature=4, **SMALL)
    with pytest.raises(TargetsError, match="top 16; choose 1 to 16"):
        train(str(folder), cache, run, k=64, **SMALL)
    with pytest.raises(CacheFormatError, match="is not a cache"):
        train(str(folder), tmp_path / "nothing", run, **SMALL)
    with pytest.raises(ModelError, match="there is no folder"):
        train(str(tmp_path / "nothing"), cache, run, **SMALL)
    with pytest.raises(ConfigError, match=r"tail .*is 'all'; expected one of auto, bucket, sampled, none"):
        train(str(folder), cache, run, tail="all", **SMALL)
    assert not run.exists()


def test_the_trainers_defaults_are_those_of_transformers_with_a_few_exceptions(tmp_path: Path) -> None:
    needed = {"student": "s", "cache": "c", "out": tmp_path}
    ours = training_arguments(load_train_config(None, needed | {"use_cpu": True}))
    assert (ours.logging_steps, ours.report_to, ours.output_dir) == (10, [], str(tmp_path))
    chosen = training_arguments(load_train_config(None, needed | {"use_cpu": True, "logging_steps": 3}))
    assert chosen.logging_steps == 3
    assert (chosen.per_device_train_batch_size, chosen.num_train_epochs) == (8, 3)


# Learning


def pretrained(model: Any, steps: int, seed: int = 0) -> Any:
    """Train a model on the text of the embedded data set."""
    text = "\n".join(pair.response for pair in stdlib_pairs())[:1_000_000]
    tokens = torch.tensor(tiny_tokenizer()(text, verbose=False).input_ids)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 129, (8, 1), generator=generator)
        batch = tokens[starts + torch.arange(129)]
        logits = model.train()(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def text_examples(split: str, num_examples: int) -> Any:
    pairs = list(stdlib_pairs())
    chosen = pairs[:num_examples] if split == "train" else pairs[-num_examples:]
    rows: Any = [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": pair.response}]}
        for pair in chosen
    ]
    return tokenised(rows, max_length=128)


def learnt(tmp_path: Path, hidden: int, teacher_steps: int, num_examples: int, steps: int) -> dict[str, TrainSummary]:
    """Train the same student on one cache by ToDi and by fine-tuning alone, with the same steps and seed."""
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 4, "initializer_range": 0.02}
    model = pretrained(llama(**shape), teacher_steps)
    teacher = as_teacher(model, tiny_tokenizer())
    for name, count in (("train", num_examples), ("heldout", 16)):
        capture(teacher, text_examples(name, count), tmp_path / name, k=16, tail_samples=8, shard_tokens=65_536)
    found = {}
    for name, kd_weight in (("todi", 0.5), ("sft", 0.0)):
        student = llama(seed=1, **(shape | {"hidden_size": hidden // 2, "num_hidden_layers": 2}))
        settings = SMALL | {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "max_steps": steps, "seed": 7}
        found[name] = train(
            student,
            tmp_path / "train",
            tmp_path / name,
            eval_cache=tmp_path / "heldout",
            tokenizer=tiny_tokenizer(),
            kd_weight=kd_weight,
            **settings,
        )
    return found


def assert_todi_ends_closer(found: dict[str, TrainSummary]) -> None:
    """Closer to the teacher on held-out text, by both Kullback-Leibler divergences."""
    for name in ("forward_kl", "reverse_kl"):
        assert found["todi"].before[name] == found["sft"].before[name]
        ends = {run: summary.after[name] for run, summary in found.items()}
        assert all(math.isfinite(end) for end in ends.values())
        assert ends["todi"] < 0.9 * ends["sft"], ends
        assert ends["todi"] < 0.7 * found["todi"].before[name], ends


def test_distillation_ends_closer_to_the_teacher_than_fine_tuning(tmp_path: Path) -> None:
    assert_todi_ends_closer(learnt(tmp_path, hidden=64, teacher_steps=60, num_examples=48, steps=30))


@pytest.mark.slow
def test_distillation_from_a_better_teacher_ends_closer_to_it_than_fine_tuning(tmp_path: Path) -> None:
    assert_todi_ends_closer(learnt(tmp_path, hidden=128, teacher_steps=400, num_examples=256, steps=128))


def test_several_caches_are_trained_on_with_each_sequence_once(
    folder: Path, cache: Cache, heldout: Cache, tmp_path: Path
) -> None:
    places = (cache.root, heldout.root, cache.root)
    summary = train(str(folder), places, tmp_path / "run", num_train_epochs=1, **SMALL)
    assert summary.num_tokens == int(cache.num_tokens.sum() + heldout.num_tokens.sum())


def test_the_examples_of_a_data_set_are_found_in_a_cache_by_content(
    folder: Path, teacher: Teacher, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {word}", "completion": f"{word} it is"} for word in ("one", "two", "three", "four")]
    write_jsonl(tmp_path / "all.jsonl", rows)
    write_jsonl(tmp_path / "some.jsonl", [rows[2], rows[0]])
    write_jsonl(tmp_path / "more.jsonl", [rows[1], {"prompt": "Say five", "completion": "five it is"}])
    capture(teacher, load_examples(DataConfig(data=str(tmp_path / "all.jsonl")), teacher.tokenizer), tmp_path / "cache")
    whole = open_cache(tmp_path / "cache")
    found = select_data(whole, SelectedData(data=str(tmp_path / "some.jsonl")), teacher.tokenizer)
    assert found.content_keys.to_hex() == [whole.content_keys.to_hex()[index] for index in (2, 0)]
    data = str(tmp_path / "some.jsonl")
    summary = train(str(folder), whole.root, tmp_path / "run", data=data, num_train_epochs=1, **SMALL)
    assert summary.num_tokens == int(found.num_tokens.sum())
    more = SelectedData(data=str(tmp_path / "more.jsonl"), limit=2)
    message = r"cache lacks 1 of the 2 examples of .*more.jsonl: .*more.jsonl:1; append them with `todi capture .*"
    with pytest.raises(
        CacheIncompleteError, match=message + r"more.jsonl --limit 2 .*--out \S+cache`, or .*--reuse \S+cache --out NEW"
    ):
        select_data(whole, more, teacher.tokenizer)
    with pytest.raises(CacheMismatchError, match="the tokenizer of the student is not"):
        select_data(whole, SelectedData(data=data), tiny_tokenizer(vocab_size=400))
    with pytest.raises(ModelError, match="needs the student's tokenizer"):
        select_data(whole, SelectedData(data=data), None)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
