"""What holds for every test: no network, no bars, two threads, and shapes checked against signatures."""

import logging
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

from jaxtyping import install_import_hook

# Only the modules whose signatures carry shapes. Before their first import, so before every other import of ours.
CHECKED = ("models", "teacher", "targets", "losses", "trainer")
install_import_hook([f"todi_offline.{name}" for name in CHECKED], "beartype.beartype")

import pytest
import torch
import transformers

torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _propagate_transformers_logs() -> None:
    """Keep transformers' own log handler, which writes to the real stderr, out of the way."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
