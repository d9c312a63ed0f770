"""`make_student`: a folder with a teacher comes in; a student with the teacher's tokenizer goes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import llama, save
from transformers import AutoModelForCausalLM

from todi_offline.errors import ConfigError
from todi_offline.student import MakingConfig, Widths, fresh_student, make_student, prune_depth


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(num_hidden_layers=4), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = tmp_path / "texts.txt"
    rows.write_text("".join(f"Line {number} says something about {number * 7}.\n" for number in range(9)))
    return rows


def same_weights(folder: Path, model: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_saved_student_loads_with_its_teachers_tokenizer(teacher: Path, tmp_path: Path) -> None:
    assert make_student(str(teacher), tmp_path / "two", layers=2).layers == (0, 3)
    assert make_student(str(teacher), tmp_path / "list", keep=[0, 1, 3]).layers == (0, 1, 3)
    same_weights(tmp_path / "list", prune_depth(llama(num_hidden_layers=4), [0, 1, 3]))
    assert (tmp_path / "two" / "tokenizer.json").read_text() == (teacher / "tokenizer.json").read_text()


def test_depth_and_width_are_cut_together_by_the_data_that_are_named(
    teacher: Path, texts: Path, tmp_path: Path
) -> None:
    sizes = {"layers": 2, "hidden": 16, "heads": 2, "mlp": 40}
    made = make_student(str(teacher), tmp_path / "out", importance_data=str(texts), importance_rows=5, **sizes)
    assert made.layers == (0, 3)
    assert made.sizes == {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 40,
    }
    assert made.teacher_sizes["intermediate_size"] == 64
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.num_parameters() == made.num_parameters < made.teacher_parameters
    other = make_student(str(teacher), tmp_path / "again", importance_data=str(texts), importance_rows=5, **sizes)
    assert other == made
    same_weights(tmp_path / "again", loaded)


def test_a_fresh_student_is_made_of_a_config(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.toml"
    file.write_text(
        f'source = "{teacher}"\nout = "{tmp_path / "out"}"\nfresh = true\nhidden = 16\nlayers = 3\nseed = 7\n'
    )
    made = make_student(config=file, layers=2)
    assert made.fresh
    assert made.layers == (0, 3)
    same_weights(tmp_path / "out", fresh_student(llama(num_hidden_layers=4), Widths(hidden=16), layers=2, seed=7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"the student has no size; name a number of layers \(--layers 8\), the layers"),
        (
            {"layers": 1, "keep": [0]},
            "both --layers and --keep are given; name only one of them",
        ),
        ({"fresh": True, "keep": [0]}, "--keep names layers of the teacher, and --fresh keeps none"),
        ({"mlp": 8, "importance_rows": 0}, "importance_rows is 0; expected a number of examples above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MakingConfig(source="teacher", out=Path("student"), **settings)


def test_a_folder_that_is_not_empty_is_refused(teacher: Path) -> None:
    with pytest.raises(ConfigError, match=f"{teacher.name} is not empty; choose another folder for the student"):
        make_student(str(teacher), teacher, layers=1)


def test_a_file_in_place_of_the_folder_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; choose another folder for the student"):
        make_student(str(teacher), tmp_path / "file", layers=1)
