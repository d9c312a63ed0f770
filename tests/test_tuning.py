"""Chunk sizes: from a CPU's caches or a device's memory, within bounds."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from todi_offline import tuning
from todi_offline.targets.rows import chunk_rows

CUDA, MIB = torch.device("cuda", 0), 2**20


@pytest.fixture(autouse=True)
def _undecided() -> Iterator[None]:
    tuning._device_bytes.cache_clear()
    yield
    tuning._device_bytes.cache_clear()


def test_a_cpu_gets_a_chunk_size_that_fits_its_caches() -> None:
    assert tuning.chunk_bytes(torch.device("cpu"), 72 * MIB) == 72 * MIB


@pytest.mark.parametrize(
    ("free_gib", "expected_mib"), [(0, 64), (0.5, 64), (1, 64), (3, 128), (7.9, 256), (8, 512), (139, 512)]
)
def test_a_device_gets_a_share_of_its_free_memory(free_gib: float, expected_mib: int, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "free_bytes", lambda device: int(free_gib * 2**30))
    assert tuning.chunk_bytes(CUDA, 1) == expected_mib * MIB
    assert chunk_rows(151_936, CUDA) == max(expected_mib * MIB // (4 * 151_936) // 16 * 16, 16)


def test_it_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([8 * 2**30, 2**30])
    monkeypatch.setattr(tuning, "free_bytes", lambda device: next(free))
    assert tuning.chunk_bytes(CUDA, 1) == tuning.chunk_bytes(CUDA, 1) == 512 * MIB


def test_memory_reserved_but_unused_by_torch_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"memory_reserved": 5, "memory_allocated": 2, "mem_get_info": (10, 100)}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert tuning.free_bytes(CUDA) == 13
    monkeypatch.setattr(
        torch, "mps", SimpleNamespace(recommended_max_memory=lambda: 9, driver_allocated_memory=lambda: 2)
    )
    assert tuning.free_bytes(torch.device("mps")) == 7
    assert tuning.free_bytes(torch.device("meta")) == 0


def test_a_huge_vocabulary_has_rows_enough_for_a_product() -> None:
    assert chunk_rows(10**8) == 16
