"""What the trainer refuses before its first step."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, llama
from support.tiny_runs import QUIET, trainer_of
from transformers import TrainingArguments

from benchmarks._zoo import tiny_model
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import CacheMismatchError, ConfigError, DataError, ModelError, TargetsError
from todi_offline.losses import DistillationConfig
from todi_offline.student import LoraSettings, add_lora
from todi_offline.teacher.in_transformers import Teacher, as_teacher
from todi_offline.training.trainer import ToDiTrainer


def test_another_tokenizer_is_refused_with_each_part_that_differs(cache: Cache, tmp_path: Path) -> None:
    other = tiny_tokenizer(chat=False)
    with pytest.raises(CacheMismatchError, match=r"special_ids: not the same") as error:
        trainer_of(tmp_path, cache, tokenizer=other)
    assert "vocabulary" not in str(error.value)
    with pytest.raises(CacheMismatchError, match="the tokenizer of the student is not the one"):
        trainer_of(tmp_path, None, eval_dataset={"held out": cache}, tokenizer=tiny_tokenizer(vocab_size=480))


def test_a_trainer_without_a_tokenizer_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs processing_class"):
        ToDiTrainer(llama(), TrainingArguments(output_dir=str(tmp_path), **QUIET), cache)


def test_a_tokenizer_with_an_id_beyond_the_heads_rows_is_refused_where_a_row_uses_it(
    examples: Examples, tmp_path: Path
) -> None:
    """As Gemma 3's of 1B and 270M: 262,145 ids, and 262,144 rows."""
    known = [example for example in examples if example.token_ids.max() < VOCAB - 1]
    teacher = as_teacher(tiny_model("gemma3_text", vocab_size=VOCAB - 1), tiny_tokenizer())
    capture(teacher, Examples.from_list(known), tmp_path / "cache", k=8)
    cache = open_cache(tmp_path / "cache")
    assert (len(cache), cache.manifest.vocab_size) == (len(known), VOCAB - 1)
    trainer = trainer_of(tmp_path / "run", cache, tiny_model("gemma3_text", vocab_size=VOCAB - 1), max_steps=1)
    assert trainer.train().global_step == 1
    ids = known[1].token_ids.copy()
    ids[3] = VOCAB - 1
    using = Examples.from_list([known[0], dataclasses.replace(known[1], token_ids=ids)])
    with pytest.raises(
        DataError,
        match=rf"example {known[1].id!r} holds the id 511, which the tokenizer knows, but the teacher has only 511 ids",
    ):
        capture(teacher, using, tmp_path / "other", k=8)


def test_weights_in_float16_are_not_trained(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights are float16, .*fp16=true .*LoRA"):
        trainer_of(tmp_path, cache, llama().half())
    adapted = add_lora(llama().half(), LoraSettings(lora_r=2))
    assert trainer_of(tmp_path, cache, adapted).train_dataset is not None
    assert trainer_of(tmp_path, None, llama().half(), eval_dataset=cache).eval_dataset is not None


def test_a_student_of_a_smaller_vocabulary_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="head has 500 ids"):
        trainer_of(tmp_path, cache, llama(vocab_size=500))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3.0}, r"temperature 3; these targets have 1, 2"),
        ({"k": 17}, r"k is 17, but these targets hold the top 16"),
    ],
)
def test_an_objective_that_the_cache_cannot_serve_is_refused(
    changes: dict[str, Any], message: str, cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(TargetsError, match=message):
        trainer_of(tmp_path, cache, distillation=DistillationConfig(**changes))


def test_samples_that_were_not_captured_are_refused(teacher: Teacher, examples: Examples, tmp_path: Path) -> None:
    capture(teacher, examples, tmp_path / "cache", k=8, tail_samples=0)
    with pytest.raises(TargetsError, match="hold no samples of the tail"):
        trainer_of(tmp_path, open_cache(tmp_path / "cache"), distillation=DistillationConfig(tail="sampled"))


def test_several_gpus_in_one_process_are_refused(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    with pytest.raises(ConfigError, match="4 GPUs are visible to one process; start one process a GPU"):
        trainer_of(tmp_path, cache)


def test_caches_with_different_settings_are_refused(
    teacher: Teacher, heldout_examples: Examples, cache: Cache, tmp_path: Path
) -> None:
    capture(teacher, heldout_examples, tmp_path / "cache", k=8, temperatures=[2.0, 1.0], tail_samples=0)
    with pytest.raises(CacheMismatchError, match=r"temperatures: \(2\.0, 1\.0\) here, \(1\.0, 2\.0\) there"):
        trainer_of(tmp_path, cache, eval_dataset=open_cache(tmp_path / "cache"))
