"""The fused loss works in chunks: how many rows they have, and how little memory they take."""

import pytest
import torch
from support.fused import VOCAB, WIDTH, assert_equal, case, fused, readable
from torch.utils._python_dispatch import TorchDispatchMode

import todi_offline.losses.fused
import todi_offline.losses.fused_rows
import todi_offline.tuning


class Largest(TorchDispatchMode):
    """Record the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.fixture
def chunks(monkeypatch):
    """Return a list to which the number of rows of every chunk is added."""
    num_rows, split = [], todi_offline.losses.fused_rows._split

    def watched(logits, *others):
        num_rows.append(len(logits))
        return split(logits, *others)

    monkeypatch.setattr(todi_offline.losses.fused_rows, "_split", watched)
    return num_rows


@pytest.mark.parametrize(("options", "num_copies"), [({}, 1), ({"temperature": 2.0}, 1), ({"softcap": 3.0}, 2)])
def test_buffers_as_large_as_a_chunk_count_towards_its_bytes(options, num_copies, chunks, monkeypatch):
    monkeypatch.setattr(todi_offline.tuning, "CPU_LOSS_BYTES", 8 * VOCAB * 4)
    fused(*case(num_targets=8, dtype=torch.float32), **options)
    assert chunks == [8 // num_copies] * num_copies


def test_no_chunk_is_much_smaller_than_the_others(chunks, monkeypatch):
    monkeypatch.setattr(todi_offline.tuning, "CPU_LOSS_BYTES", 4 * VOCAB * 8)
    assert_equal(case(num_targets=9), chunk_targets=None)
    assert chunks == [3, 3, 3]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_size_of_pieces_and_blocks_does_not_matter(temperature, monkeypatch):
    monkeypatch.setattr(todi_offline.tuning, "CPU_PASS_BYTES", 2 * VOCAB * 8)
    monkeypatch.setattr(todi_offline.tuning, "CPU_BLOCK_IDS", 4)
    hidden, weight, bias, labels, targets = case()
    for either in (bias, None):
        assert_equal((hidden, weight, either, labels, targets), temperature=temperature, chunk_targets=5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_logits_of_all_targets_never_exist(temperature):
    num_targets, vocab, chunk_targets = 64, 200, 4
    inputs = case(num_targets, vocab=vocab)

    def largest(function, **options):
        with Largest() as mode:
            function(*inputs, temperature=temperature, **options)[0].backward()
        return mode.num_elements

    assert largest(fused, chunk_targets=chunk_targets) == max(chunk_targets, WIDTH) * vocab
    assert largest(readable) == num_targets * vocab


def test_with_kd_alone_the_gradient_is_computed_from_the_selected_rows(chunks):
    fused(*case(num_targets=10), kd_weight=1.0, positions="student-entropy:0.2", chunk_targets=4)
    assert chunks == [4, 4, 2, 2]
    chunks.clear()
    fused(*case(num_targets=10), kd_weight=0.9, positions="student-entropy:0.2", chunk_targets=4)
    assert chunks == [4, 4, 2, 4, 4, 2]
