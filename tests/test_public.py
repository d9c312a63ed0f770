"""The public interface: its names, its signatures, and a cheap import."""

import inspect
import subprocess
import sys

import pytest

import todi_offline
from todi_offline.losses import dense_divergence, sparse_divergence


def parameters(function: object) -> dict[str, object]:
    """Names, in order, with their defaults; `...` where there is none, a star before what is keyword-only."""
    return {
        ("*" if parameter.kind is parameter.KEYWORD_ONLY else "") + name: (
            ... if parameter.default is parameter.empty else parameter.default
        )
        for name, parameter in inspect.signature(function).parameters.items()  # type: ignore[arg-type]
    }


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, todi_offline; dir(todi_offline); todi_offline.__version__;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'zarr', 'pyarrow') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_opening_a_cache_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from todi_offline import open_cache, Cache;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_public_names_are_these_and_each_resolves() -> None:
    names = [
        "Cache",
        "CaptureConfig",
        "DistillationConfig",
        "EvaluateConfig",
        "SparseTargets",
        "ToDiTrainer",
        "TrainConfig",
        "capture",
        "evaluate",
        "open_cache",
        "sparsify",
        "train",
    ]
    assert todi_offline.__all__ == names
    for name in names:
        found = getattr(todi_offline, name)
        assert found.__name__ == name
        assert found.__doc__
        assert name in dir(todi_offline)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'nope'; it has Cache, .*capture, .*train"):
        todi_offline.nope  # noqa: B018


def test_the_functions_of_both_stages_take_these() -> None:
    assert parameters(todi_offline.capture) == {
        "teacher": None,
        "data": None,
        "out": None,
        "*config": None,
        "*progress": None,
        "settings": ...,
    }
    assert parameters(todi_offline.open_cache) == {"place": ..., "*allow_unsealed": False}
    assert parameters(todi_offline.train) == {
        "student": None,
        "cache": None,
        "out": None,
        "*eval_cache": None,
        "*tokenizer": None,
        "*config": None,
        "*callbacks": None,
        "settings": ...,
    }


def test_the_evaluation_takes_these() -> None:
    assert parameters(todi_offline.evaluate) == {
        "student": None,
        "*cache": None,
        "*data": None,
        "*tokenizer": None,
        "*config": None,
        "*progress": None,
        "settings": ...,
    }


def test_the_functions_of_the_mathematics_take_these() -> None:
    sparsified = parameters(todi_offline.sparsify)
    assert list(sparsified)[:5] == ["logits", "k", "temperatures", "num_tail_samples", "generator"]
    assert [sparsified[name] for name in ("temperatures", "num_tail_samples", "generator")] == [(1.0, 2.0), 0, None]
    dense = {"student_logits": ..., "teacher_logits": ..., "divergence": "todi", "*beta": 1.0, "*temperature": 1.0}
    assert parameters(dense_divergence) == dense
    assert parameters(sparse_divergence) == {
        "student_logits": ...,
        "targets": ...,
        "divergence": "todi",
        "*beta": 1.0,
        "*temperature": 1.0,
        "*k": None,
        "*tail": "auto",
        "*tail_weight": None,
        "*head_weight": 1.0,
        "*mass_weight": 1.0,
    }
