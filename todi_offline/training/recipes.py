"""The name of a recipe and your settings come in; the settings that the recipe adds go out.

`paper` and `paper-lora` are the two experiments of the ToDi paper (arXiv 2505.16297) whose scripts its authors
published, github.com/jungseongryong/ToDi at commit 37e9bec: full fine-tuning of a GPT-2 of 120M parameters
(scripts/gpt2/vanilla_kd_gpt2_base.sh), and LoRA on a TinyLlama of 1.1B (scripts/tinyllama/vanilla_kd_tinyllama.sh),
both with `KD_OBJ` set to ToDi. The scripts set

    temperature 2, kd_weight .5; 20 or 10 epochs; peak learning rate 5e-4 or 1e-3, no warm-up, cosine decay; weight
    decay .01; gradient clipping at norm 1; 4 sequences per device, 2 accumulation steps and 4 devices, so 32 sequences
    per step; bf16; seed 10; LoRA of rank 256, alpha 8, dropout .1

The Python code of the same repository sets beta = 1 without a factor T^2 (code/criterions/various_divergence.py) and a
minimum learning rate of 1e-7 (code/arguments.py). AdamW with torch's default betas and epsilon, and torch's
CosineAnnealingLR, are from code/utils.py of github.com/songmzhang/DSKD, on which that code is based. These are the
numbers of the scripts; they were not compared with the numbers printed in the paper.

The capture needs matching options: --temperature 1 --temperature 2 --tail-temperature 2 --max-length 512
--max-prompt-length 256, on Dolly with its ready-made prompts, from a teacher fine-tuned on the same data.

Differences from the scripts: their targets are dense. They keep the epoch with the best ROUGE-L on held-out data; here
every epoch is kept, and `todi evaluate --data` finds the best. Their weights are bf16 with a float32 copy; here they
are float32 under autocast. They drop the last, incomplete step of an epoch.
"""

import os
from collections.abc import Mapping
from typing import Any

from todi_offline.errors import ConfigError

SEQUENCES_PER_STEP = 32

_PAPER: dict[str, Any] = {
    "divergence": "todi",
    "beta": 1.0,
    "temperature": 2.0,
    "kd_weight": 0.5,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-7},
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "bf16": True,
    "seed": 10,
    "save_strategy": "epoch",
}

RECIPES: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-lora": _PAPER
    | {
        "num_train_epochs": 10,
        "learning_rate": 1e-3,
        "lora_r": 256,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
    },
}


def recipe_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe adds to the `given` settings, which win over it.

    The accumulation steps follow from the number of processes, so that a step has the recipe's number of sequences.

    Raises:
        ConfigError: the recipe is unknown, or its number of sequences per step cannot be reached.
    """
    if name not in tuple(RECIPES):
        raise ConfigError(f"recipe is {name!r}; expected one of {', '.join(RECIPES)}")
    settings = {key: value for key, value in RECIPES[name].items() if key not in given}
    if "lr_scheduler_type" in given:
        settings.pop("lr_scheduler_kwargs", None)  # they belong to the recipe's own schedule
    if "gradient_accumulation_steps" not in given:
        settings["gradient_accumulation_steps"] = _accumulation(name, {**settings, **given})
    return settings


def _accumulation(name: str, settings: Mapping[str, Any]) -> int:
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
    batch: int = settings["per_device_train_batch_size"]
    steps, remainder = divmod(SEQUENCES_PER_STEP, max(num_processes * batch, 1))
    if remainder or not steps:
        raise ConfigError(
            f"{num_processes} processes with batches of {batch} cannot make up the {SEQUENCES_PER_STEP} sequences a "
            f"step of recipe {name}; set per_device_train_batch_size or gradient_accumulation_steps"
        )
    return steps
