"""`make_student`: a folder with a teacher in, one with a student and the teacher's tokenizer out."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import llama, save
from transformers import AutoModelForCausalLM

from todi_offline.errors import ConfigError
from todi_offline.student import make_student, prune_depth


def test_a_saved_student_loads_with_its_teachers_tokenizer(tmp_path: Path) -> None:
    teacher = llama(num_hidden_layers=4)
    folder = save(teacher, tmp_path / "teacher")
    assert make_student(str(folder), tmp_path / "two", layers=2) == [0, 3]
    assert make_student(str(folder), tmp_path / "list", keep=[0, 1, 3]) == [0, 1, 3]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "list")
    torch.testing.assert_close(loaded.state_dict(), prune_depth(teacher, [0, 1, 3]).state_dict(), rtol=0, atol=0)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_a_student_needs_a_number_or_a_list_of_layers_and_an_empty_folder(tmp_path: Path) -> None:
    folder = str(save(llama(), tmp_path / "teacher"))
    for options in ({}, {"layers": 1, "keep": [0]}):
        with pytest.raises(ConfigError, match="name either a number of layers"):
            make_student(folder, tmp_path / "student", **options)
    with pytest.raises(ConfigError, match=r"teacher is not empty"):
        make_student(folder, tmp_path / "teacher", layers=1)
    assert not (tmp_path / "student").exists()
