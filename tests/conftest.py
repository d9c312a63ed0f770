"""Settings for all tests: no network, no progress bars, one thread, and shape checks of signatures."""

# ruff: noqa: E402 -- the hook comes before what it hooks
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

from collections.abc import Iterator

import pytest
import torch
import transformers
from jaxtyping import install_import_hook

# Only the modules whose signatures carry shapes, and before anything of ours is imported.
CHECKED = ("models", "targets", "teacher", "losses", "training.trainer", "evaluation")
CHECKED += ("evaluation", "probes")
install_import_hook([f"todi_offline.{name}" for name in CHECKED], "beartype.beartype")

from support.tiny import tiny_tokenizer
from support.tiny_models import llama

from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import DataConfig, Examples, examples_from_rows
from todi_offline.data.stdlib_corpus import stdlib_pairs
from todi_offline.teacher.in_transformers import Teacher, as_teacher

torch.set_num_threads(1)  # tiny matrices gain nothing from more, and wait where a core is busy
transformers.utils.logging.disable_progress_bar()

Row = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def conversations() -> list[Row]:
    """Chats of one or two turns and of unlike lengths, many of them longer than the examples may be."""
    pairs = list(stdlib_pairs())[:400]
    cuts = (40, 90, 200, 500)
    turns = [
        [
            {"role": "user", "content": pair.instruction[-20:]},
            {"role": "assistant", "content": pair.response[: cuts[number % 4]]},
        ]
        for number, pair in enumerate(pairs)
    ]
    return [
        {"messages": first + (second if number % 3 else [])}
        for number, (first, second) in enumerate(zip(turns[::2], turns[1::2], strict=True))
    ]


@pytest.fixture(scope="session")
def examples(conversations: list[Row]) -> Examples:
    """Twenty-one of them: no multiple of a batch."""
    return tokenised(conversations[:21])


@pytest.fixture(scope="session")
def heldout_examples(conversations: list[Row]) -> Examples:
    return tokenised(conversations[-7:])


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    return as_teacher(llama(), tiny_tokenizer())


@pytest.fixture(scope="session")
def cache(teacher: Teacher, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return captured(teacher, examples, tmp_path_factory)


@pytest.fixture(scope="session")
def heldout(teacher: Teacher, heldout_examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return captured(teacher, heldout_examples, tmp_path_factory)


def tokenised(rows: list[Row], max_length: int = 128) -> Examples:
    return examples_from_rows(rows, DataConfig(max_length=max_length, max_prompt_length=64), tiny_tokenizer())


def captured(teacher: Teacher, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    capture(teacher, examples, folder, k=16, tail_samples=4, encoding="f16", shard_tokens=4096, codec="fast")
    return open_cache(folder)
