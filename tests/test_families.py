"""Families of models: each statement of benchmarks/results/families.md is true."""

import logging

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks._zoo import FAMILIES
from benchmarks.families import RESULT, examine, table_row

IN_CI = (
    "llama",
    "gemma2",  # a soft cap
    "granite",  # a scaled head
    "cohere2",  # that, and tied
    "smollm3",  # layers without positions
    "gpt2",  # learned positions
    "qwen3_moe",
    "llama4_text",  # chunks, and two kinds of layers
    "mamba2",  # a row for each sequence
    "falcon_h1",
    "recurrent_gemma",
    "diffllama",  # cannot be pruned
)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_behaves_as_the_table_states(family: str, caplog: pytest.LogCaptureFixture) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no such family")
    caplog.set_level(logging.ERROR)
    assert table_row(family, examine(family)) in RESULT.read_text().splitlines()


def test_the_table_has_every_family_and_no_error() -> None:
    rows = [line.split("|")[1:-1] for line in RESULT.read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == list(FAMILIES)
    assert len(rows) - 1 >= 30
    assert not any(cell.strip().startswith("wrong") for row in rows for cell in row)
