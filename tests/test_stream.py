"""Order, packing and prefetching: each sequence exactly once, and isolated from its neighbours."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import gpt2, llama
from torch import Tensor

from benchmarks._zoo import tiny_model
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.cache.store.staging import Staging
from todi_offline.losses import distillation_loss
from todi_offline.models.head import head_of
from todi_offline.training.stream import (
    EMPTY,
    CacheDataset,
    Collator,
    ShuffledOrder,
    WindowShuffledOrder,
    batch_targets,
    order_name,
    pack_rows,
    prefetch,
    training_order,
)

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


def order_of(num_sequences: int, seed: int, epoch: int) -> list[int]:
    order = ShuffledOrder(num_sequences, seed)
    order.set_epoch(epoch)
    return list(order)


@given(st.integers(1, 300), st.integers(-(2**40), 2**70), st.integers(0, 10_000))
def test_an_order_holds_every_sequence_once_and_follows_from_its_arguments(
    num_sequences: int, seed: int, epoch: int
) -> None:
    torch.rand(3)  # no random state of torch or numpy has a part in it
    first = order_of(num_sequences, seed, epoch)
    np.random.default_rng().random()
    assert sorted(first) == list(range(num_sequences))
    assert first == order_of(num_sequences, seed, epoch)
    assert len(ShuffledOrder(num_sequences, seed)) == num_sequences


def test_orders_differ_by_epoch_and_by_seed() -> None:
    orders = {tuple(order_of(50, seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9


def test_the_order_of_a_seed_is_this_one_in_every_release() -> None:
    assert order_of(10, 42, 0) == [2, 4, 5, 0, 9, 8, 1, 7, 3, 6]
    assert order_of(10, 42, 1) == [7, 1, 4, 9, 8, 3, 5, 0, 2, 6]


def window_order(shards: list[int], seed: int = 0, epoch: int = 0, window: int = 8) -> list[int]:
    order = WindowShuffledOrder(np.array(shards), seed, window)
    order.set_epoch(epoch)
    return list(order)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=100), st.integers(0, 2**70), st.integers(0, 99), st.data())
def test_an_order_by_windows_holds_every_sequence_once_and_few_shards_at_a_time(
    shards: list[int], seed: int, epoch: int, data: st.DataObject
) -> None:
    window = data.draw(st.integers(1, 12))
    order = window_order(shards, seed, epoch, window)
    assert sorted(order) == list(range(len(shards)))
    assert order == window_order(shards, seed, epoch, window)
    drawn = [shards[index] for index in order]
    for place in range(len(drawn)):
        begun, to_come = set(drawn[: place + 1]), set(drawn[place:])
        assert len(begun & to_come) <= window


def test_windows_and_their_contents_differ_by_epoch_and_by_seed() -> None:
    shards = [shard for shard in range(12) for _ in range(3)]
    orders = [window_order(shards, seed, epoch, window=4) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert len({frozenset(shards[index] for index in order[:12]) for order in orders}) > 5
    assert all(len({shards[index] for index in order[:12]}) == 4 for order in orders)


def test_the_order_by_windows_of_a_seed_is_this_one_in_every_release() -> None:
    shards = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert window_order(shards, seed=42, window=2) == [2, 0, 1, 9, 8, 7, 5, 3, 4, 6]
    assert window_order(shards, seed=42, epoch=1, window=2) == [0, 1, 4, 2, 3, 5, 9, 8, 6, 7]


def test_the_shards_of_this_window_and_of_the_next_are_prepared() -> None:
    prepared: dict[int, threading.Event] = {shard: threading.Event() for shard in range(6)}

    def prepare(shard: int) -> None:
        prepared[shard].set()
        raise OSError("dropped: who reads the shard meets it again")

    shards = np.repeat(np.arange(6), 2)
    expected = [int(shards[index]) for index in WindowShuffledOrder(shards, 1, 1)][::2]
    order = iter(WindowShuffledOrder(shards, 1, 1, prepare))
    for number in range(5):
        next(order), next(order)
        for shard in expected[number : number + 2]:
            assert prepared[shard].wait(timeout=10)
        assert not any(prepared[shard].is_set() for shard in expected[number + 2 :])
    assert len(list(order)) == 2


def test_shards_of_windows_that_are_skipped_are_not_prepared() -> None:
    """A run that is resumed draws what it has seen before, and drops it."""
    begun, go_on, third, prepared = threading.Event(), threading.Event(), threading.Event(), list[int]()

    def prepare(shard: int) -> None:
        prepared.append(shard)
        (begun if len(prepared) < 3 else third).set()
        assert go_on.wait(timeout=10)

    shards = np.arange(50)
    expected = list(WindowShuffledOrder(shards, 1, 1))
    order = iter(WindowShuffledOrder(shards, 1, 1, prepare))
    next(order)
    assert begun.wait(timeout=10)
    for _ in range(30):
        next(order)
    go_on.set()
    assert third.wait(timeout=10)
    assert prepared == [expected[0], expected[30], expected[31]]
    order.close()  # type: ignore[attr-defined]


def test_a_remote_cache_is_trained_by_windows_and_told_where_they_do_not_fit(
    cache: Cache, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert type(training_order(cache, 3)) is ShuffledOrder
    assert list(training_order(cache, 3)) == order_of(len(cache), 3, 0)
    store = RemoteStore(f"memory:/{tmp_path}", staging=Staging(tmp_path))
    for key in cache.store.find():
        store.copy_from(cache.store, key, key)
    remote = open_cache(store)
    order = training_order(remote, 3)
    assert isinstance(order, WindowShuffledOrder)
    assert list(order) == window_order(remote.shards.tolist(), 3)
    assert order_name(cache) != order_name(remote) == order_name(open_cache(store))
    assert caplog.text == ""
    store.staging.limit_gb = 1e-6
    training_order(remote, 3)
    assert re.search(
        r"1 shards of memory:.* take .* GB, but the limit of .* is 1e-06 GB: some shards are fetched again", caplog.text
    )


@given(LENGTHS, st.integers(1, 300))
def test_packed_rows_hold_every_sequence_once_and_no_row_more_than_it_can(lengths: list[int], row_length: int) -> None:
    rows = pack_rows(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[index] for index in row) <= row_length for row in rows)
    assert len(rows) <= len(lengths)


def test_packing_fills_rows() -> None:
    assert pack_rows([100, 60, 40, 30, 30, 40], 100) == [[0], [1, 2], [5, 3, 4]]


def test_a_batch_names_the_positions_and_the_labels_of_its_targets(cache: Cache) -> None:
    members = [cache[index] for index in (4, 1, 9)]
    expected = {token_at for member in members for token_at in pairs_of(member)}
    for collator in (Collator(), Collator(pack=False), Collator(one_row=True)):
        batch = collator(members)
        before = batch["input_ids"].flatten()[batch["target_positions"]]
        after = batch["input_ids"].flatten()[batch["target_positions"] + 1]
        assert torch.equal(after, batch["labels"])
        assert set(zip(before.tolist(), after.tolist(), strict=True)) == expected
        assert batch["num_tokens"].tolist() == [sum(len(member.token_ids) for member in members)]


def pairs_of(sequence: CachedSequence) -> list[tuple[int, int]]:
    columns = np.flatnonzero(sequence.target_mask)
    ids = sequence.token_ids
    return list(zip(ids[columns].tolist(), ids[columns + 1].tolist(), strict=True))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("collator", [Collator(), Collator(one_row=True, bounds=True), Collator(pack=False)])
def test_packed_sequences_have_the_logits_and_the_loss_of_separate_ones(
    build: Callable[..., Any], collator: Collator, cache: Cache
) -> None:
    model = build(seed=5)
    members = [cache[index] for index in (3, 0, 6, 12, 18, 2, 1)]
    batch = collator(members)
    if collator.pack:
        assert len(batch["input_ids"]) < len(members)
    together = target_logits(model, batch)
    separate = [Collator()([member]) for member in in_batch_order(members, batch)]
    alone = torch.cat([target_logits(model, one) for one in separate])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    losses = [loss_of(target_logits(model, one), one, cache, num_targets=1) for one in separate]
    num_targets = len(batch["labels"])
    found = loss_of(together, batch, cache, num_targets)
    torch.testing.assert_close(found, torch.stack(losses).sum() / num_targets, rtol=1e-5, atol=1e-5)


def in_batch_order(members: list[CachedSequence], batch: dict[str, Tensor]) -> list[CachedSequence]:
    """The members as they lie in the rows, found by their tokens."""
    flat, starts = batch["input_ids"].flatten(), (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    by_start = {}
    for start in starts:
        for number, member in enumerate(members):
            length = len(member.token_ids)
            if flat[start : start + length].tolist() == member.token_ids.tolist():
                by_start[start] = number
    assert sorted(by_start.values()) == list(range(len(members)))
    return [members[by_start[start]] for start in sorted(by_start)]


def target_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), head_of(model).at(batch["target_positions"]):
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        return model(**inputs, use_cache=False).logits[0]


def loss_of(logits: Tensor, batch: dict[str, Tensor], cache: Cache, num_targets: int) -> Tensor:
    return distillation_loss(logits, batch["labels"], batch_targets(batch, cache), num_targets=num_targets)[0]


def test_a_batch_is_the_targets_of_the_cache(cache: Cache) -> None:
    found = batch_targets(Collator(pack=False)([cache[2], cache[3]]), cache)
    for field in ("ids", "logprobs", "tail_logsumexp", "tail_ids", "tail_logprobs"):
        stored = np.concatenate([getattr(cache[index].targets, field) for index in (2, 3)])
        np.testing.assert_array_equal(getattr(found, field).numpy(), stored)
    assert found.temperatures == cache.manifest.settings.temperatures
    assert found.tail_temperature == cache.manifest.settings.tail_temperature


@pytest.mark.parametrize("collator", [Collator(), Collator(one_row=True, bounds=True), Collator(pack=False)])
def test_empty_sequences_add_nothing_to_a_batch(collator: Collator, cache: Cache) -> None:
    dataset = CacheDataset(cache)
    without, filled = (collator([dataset[number] for number in order]) for order in ([2, 5], [EMPTY, 2, EMPTY, 5]))
    assert filled["num_tokens"] == without["num_tokens"]
    assert sorted(filled["labels"].tolist()) == sorted(without["labels"].tolist())
    logits, expected = (target_logits(llama(seed=5), batch) for batch in (filled, without))
    losses = [loss_of(*case, cache, 1) for case in ((logits, filled), (expected, without))]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("collator", [Collator(), Collator(one_row=True, bounds=True), Collator(pack=False)])
def test_a_batch_of_empty_sequences_can_be_run(collator: Collator, cache: Cache) -> None:
    batch = collator([CacheDataset(cache)[EMPTY]] * 2)
    assert batch["input_ids"].shape[1] == 1
    assert batch["num_tokens"].tolist() == [0]
    if collator.bounds:
        assert (batch["bounds"].tolist(), batch["longest"]) == ([0, 1], 1)
    assert loss_of(target_logits(llama(seed=5), batch), batch, cache, 1).item() == 0


@pytest.mark.parametrize("collator", [Collator(), Collator(pack=False)])
def test_padding_of_a_row_does_not_change_gradients(collator: Collator, cache: Cache) -> None:
    """Gemma 3n divides by norms of hidden states, which are 0 for a row of pads: their embedding is 0."""
    model = tiny_model("gemma3n_text")
    assert not model.get_input_embeddings().weight[model.config.pad_token_id].any()
    batch = collator([cache[2], cache[5]])
    assert len(batch["input_ids"].flatten()) > batch["num_tokens"]
    with head_of(model).at(batch["target_positions"]):
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        model(**inputs, use_cache=False).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_cache_is_a_data_set(cache: Cache) -> None:
    dataset = CacheDataset(cache)
    assert len(dataset) == len(cache) == len(list(dataset)) == 21
    np.testing.assert_array_equal(dataset[20].token_ids, cache[20].token_ids)


def test_a_cache_takes_no_empty_place_for_a_sequence_of_its_own(cache: Cache) -> None:
    with pytest.raises(TypeError):
        cache[EMPTY]  # type: ignore[index]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 10])
def test_prefetching_keeps_order_and_ends(length: int, depth: int) -> None:
    assert list(prefetch(iter(range(length)), depth)) == list(range(length))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_prefetching_raises_the_error_of_its_source_where_it_happened(at: int) -> None:
    def source() -> Iterator[int]:
        yield from range(at)
        raise OSError("the disk is gone")

    batches = prefetch(source())
    assert [next(batches) for _ in range(at)] == list(range(at))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_prefetching_works_ahead_in_a_thread_but_draws_the_first_in_its_callers() -> None:
    made_in: list[int] = []
    third = threading.Event()

    def source() -> Iterator[int]:
        for number in range(5):
            made_in.append(threading.get_ident())
            if number == 2:
                third.set()
            yield number

    batches = prefetch(source(), depth=2)
    next(batches)
    assert made_in[0] == threading.get_ident()
    assert next(batches) == 1
    assert third.wait(timeout=10)  # made although nobody asked for it
    assert threading.get_ident() not in made_in[1:]
    batches.close()  # type: ignore[attr-defined]
    assert len(made_in) <= 4
