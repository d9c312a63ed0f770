"""Two processes against one: the same steps and gradients, and each sequence exactly once."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.tiny_models import llama, save_llama
from support.tiny_runs import CHECKPOINTING, Noting, assert_same_weights, trainer_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from todi_offline.cache.reader import Cache, open_cache
from todi_offline.student import LoraSettings, add_lora
from todi_offline.training.first_rank import mean_over_ranks
from todi_offline.training.stream import EMPTY, CacheDataset, FilledOrder, ShuffledOrder

NUM_PROCESSES = 2


def adapted() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_lora(llama(seed=1), LoraSettings(lora_r=4))


def tied() -> Any:
    return llama(seed=1, tie_word_embeddings=True)


# 21 sequences in steps of 8: the last step of an epoch has 5, which are no whole number of anything here.
ONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
COMMON: dict[str, Any] = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
COMMON |= {"per_device_eval_batch_size": 2}
RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (lambda: llama(seed=1), {}),
    "tied": (tied, {"ddp_find_unused_parameters": False}),
    "checkpointed": (tied, {CHECKPOINTING: True}),
    "adapted": (adapted, {}),
    "readable": (tied, {}),
}

# A step of eight sequences, as two micro-batches of one process or as one of each of two.
ELASTIC: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "steps"}
ELASTIC |= {"save_steps": 1}


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def elastic(out: Path, cache: Cache, num_micro_batches: int, stop: int, *, goes_on: bool) -> Noting:
    settings = ELASTIC | {"gradient_accumulation_steps": num_micro_batches}
    trainer = trainer_of(out, cache, callbacks=[StopAfter(stop)], **settings)
    trainer.train(resume_from_checkpoint=goes_on)
    return trainer


SHARDED = ("sharded", "sharded, its head by itself", "sharded, tied", "sharded, bfloat16")


def outcome(out: Path, name: str, cache: Cache, heldout: Cache, parts: dict[str, int]) -> dict[str, Any]:
    build, settings = RUNS[name]
    trainer = trainer_of(out, cache, build(), eval_dataset=heldout, **COMMON, **parts, **settings)
    if name == "readable":
        trainer.head = dataclasses.replace(trainer.head, is_linear=False)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6
    return {
        "num_targets": [len(batch["labels"]) for batch in trainer.batches],
        "logged": [{name: entry[name] for name in ("loss", "grad_norm", "kd", "cross_entropy")} for entry in logged],
        "weights": {
            key: value.clone() for key, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        },
        "num_tokens": trainer.num_tokens_trained,
        "evaluated": {
            key: value for key, value in trainer.evaluate().items() if "second" not in key and "time" not in key
        },
    }


def gradients(trainer: Noting, model: nn.Module, batches: list[dict[str, Tensor]], num_targets: int) -> dict[str, Any]:
    """The losses and summed gradients of some micro-batches of a step, as the Trainer calls for them."""
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=num_targets)
        loss.backward()
        losses.append(loss.item())
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        evaluated = [trainer.compute_loss(model.eval(), batch).item() for batch in batches]
    return {"losses": losses, "evaluated": evaluated, "gradients": found}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def micro_batches(trainer: Noting) -> list[dict[str, Tensor]]:
    """Four of unlike sizes, the last of them empty."""
    dataset = CacheDataset(trainer.train_dataset.cache)
    groups = ([0, 1, 2], [3], [4, 5], [EMPTY])
    return [trainer.data_collator([dataset[number] for number in group]) for group in groups]


def sharded(name: str, out: Path, cache: Cache) -> dict[str, Any]:
    """A model sharded by hand: accelerate, which the Trainer leaves that to, offers FSDP on accelerators only."""
    model: Any = tied() if name.endswith("tied") else llama(seed=1)
    trainer = trainer_of(out, cache, model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if name.endswith("bfloat16") else None)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (NUM_PROCESSES,)), "mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if name.endswith("itself"):
        fully_shard(model.lm_head, **options)
    fully_shard(model, **options)
    batches = micro_batches(trainer)
    num_targets = sum(len(batch["labels"]) for batch in batches)
    return gradients(trainer, model, batches[torch.distributed.get_rank() :: NUM_PROCESSES], num_targets)


def work(rank: int, port: int, out: Path, cache_path: str, heldout_path: str) -> None:
    """What each of the processes does: all runs, one after the other, for it takes long to come up."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(NUM_PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cache, heldout = open_cache(cache_path), open_cache(heldout_path)
    found = {name: outcome(out / name, name, cache, heldout, TWO) for name in RUNS}
    found |= {name: sharded(name, out / name, cache) for name in SHARDED}
    settings = COMMON | TWO | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(out / "resumed", cache, **settings).train()
    found["mean"] = mean_over_ranks(float(rank))
    found["elastic"] = elastic(out / "elastic", cache, 1, stop=4, goes_on=True).batches
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(cache: Cache, heldout: Cache, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both processes found, and the folder in which they worked."""
    out = tmp_path_factory.mktemp("two")
    elastic(out / "elastic", cache, 2, stop=1, goes_on=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, out, str(cache.root), str(heldout.root)), nprocs=NUM_PROCESSES)
    return [torch.load(out / f"{rank}.pt") for rank in range(NUM_PROCESSES)], out


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, two: Any, cache: Cache, heldout: Cache, tmp_path: Path) -> None:
    (first, second), expected = (found[name] for found in two[0]), outcome(tmp_path, name, cache, heldout, ONE)
    for rank in (first, second):
        assert rank["num_tokens"] == expected["num_tokens"] == 2 * int(cache.num_tokens.sum())
        for mine, theirs in zip(rank["logged"], expected["logged"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert rank["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        for key, value in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][key], value, rtol=0, atol=1e-5)
    for rank, empty in ((first, []), (second, [5, 11])):  # the last micro-batch of an epoch, where five are left of 21
        assert [step for step, num_targets in enumerate(rank["num_targets"]) if not num_targets] == empty
    assert sum(first["num_targets"] + second["num_targets"]) == 2 * int(cache.num_targets.sum())


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_has_the_gradients_of_a_whole_one(name: str, two: Any, cache: Cache, tmp_path: Path) -> None:
    model = tied() if name.endswith("tied") else llama(seed=1)
    trainer = trainer_of(tmp_path, cache, model)
    batches = micro_batches(trainer)
    num_targets = sum(len(batch["labels"]) for batch in batches)
    expected = gradients(trainer, model, batches, num_targets)
    precision = 5e-2 if name.endswith("bfloat16") else 1e-5
    for rank, found in enumerate(found[name] for found in two[0]):
        losses = [loss / NUM_PROCESSES for loss in found["losses"]]
        assert losses == pytest.approx(expected["losses"][rank::NUM_PROCESSES], rel=precision)
        assert found["evaluated"] == pytest.approx(expected["evaluated"][rank::NUM_PROCESSES], rel=precision)
        for key, gradient in expected["gradients"].items():
            assert gradient.any()
            assert (found["gradients"][key] - gradient).abs().max() <= precision * gradient.abs().max(), key


def test_a_run_of_two_processes_resumes_in_one(two: Any, cache: Cache, tmp_path: Path) -> None:
    whole_run = trainer_of(tmp_path, cache, **COMMON, **ONE)
    whole_run.train()
    resumed = trainer_of(two[1] / "resumed", cache, **COMMON, **ONE)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == pytest.approx(whole_run.losses[8:], rel=1e-4)
    for key, value in whole_run.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, rtol=0, atol=1e-5)


def test_a_run_resumes_in_two_processes_and_then_in_one_with_the_same_bits(
    two: Any, cache: Cache, tmp_path: Path
) -> None:
    """Stopped in the middle of both epochs, of three steps each: the same batches in each step, the same weights."""
    whole_run = elastic(tmp_path, cache, 2, stop=6, goes_on=False)
    resumed = elastic(two[1] / "elastic", cache, 2, stop=6, goes_on=True)
    first, second = (found["elastic"] for found in two[0])
    assert (len(first), len(second), len(resumed.batches)) == (3, 3, 4)
    seen = [batch for step in zip(first, second, strict=True) for batch in step] + resumed.batches
    for found, expected in zip(seen, whole_run.batches[2:], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert_same_weights(resumed.model, whole_run.model)
    files = [out / "checkpoint-6" / "trainer_state.json" for out in (two[1] / "elastic", tmp_path)]
    states = [json.loads(file.read_text()) for file in files]
    losses, expected_losses = ([entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_a_mean_is_that_of_all_ranks(two: Any) -> None:
    assert [found["mean"] for found in two[0]] == [0.5, 0.5]


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_processes: 2
main_process_port: {port}
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_runs_under_a_launcher_and_is_the_same_run_in_one_process(
    launcher: str, cache: Cache, tmp_path: Path
) -> None:
    """For MULTI_GPU read several processes; `use_cpu` keeps them on the CPU."""
    student = save_llama(tmp_path / "student", seed=1)
    script = tmp_path / "todi.py"
    script.write_text("from todi_offline.commands.cli import main\nmain()\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tmp_path / "accelerate.yaml"
    config.write_text(ACCELERATE.format(port=port))
    launchers = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "accelerate": ["-m", "accelerate.commands.launch", "--config_file", str(config)],
    }

    def train(out: str, launcher: list[str], accumulation: int) -> tuple[str, str]:
        places = ["--student", str(student), "--cache", str(cache.root), "--out", str(tmp_path / out)]
        settings = [f"gradient_accumulation_steps={accumulation}", "use_cpu=true", "save_steps=4"]
        options = ["--batch-size", "4", "--max-steps", "4", "--json", *(f"--set={setting}" for setting in settings)]
        words = [sys.executable, *launcher, str(script), "train", *places, *options]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return done.stdout, done.stderr

    of_two, of_one = (json.loads(train(*run)[0]) for run in (("two", launchers[launcher], 1), ("one", [], 2)))
    for name in ("num_steps", "num_tokens", "train_loss"):
        assert of_two[name] == pytest.approx(of_one[name], rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one)
    assert "two is finished, after 4 steps" in train("two", [], 2)[1]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_the_order_of_a_single_one_and_each_sequence_is_some_ranks_once(
    num_sequences: int, num_ranks: int, batch_size: int, epoch: int
) -> None:
    order = ShuffledOrder(num_sequences, seed=7)
    order.set_epoch(epoch)
    together = num_ranks * batch_size
    filled = FilledOrder(order, together)
    assert len(list(filled)) == len(filled)
    shards = [
        list(BatchSamplerShard(BatchSampler(filled, batch_size, drop_last=False), num_ranks, rank, even_batches=True))
        for rank in range(num_ranks)
    ]
    assert {len(shard) for shard in shards} == {-(-num_sequences // together)}
    found = [number for step in zip(*shards, strict=True) for batch in step for number in batch]
    assert found[:num_sequences] == list(order)
    assert set(found[num_sequences:]) <= {EMPTY}
