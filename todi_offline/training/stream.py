"""A cache in, packed batches of tokens and targets out, in an order that can be resumed."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from todi_offline.cache.format.fingerprint import hash_bytes
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import Cache
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.targets.sparse import SparseTargets

logger = logging.getLogger(__name__)

T = TypeVar("T")

Batch = dict[str, Any]
"""Tensors by name, and `longest`, a number that stays on the host."""

WINDOW_SHARDS = 8

EMPTY = None
"""Stands for an empty sequence, which pads the last batch. It is no number, so that no cache takes it for an index."""


class CacheDataset(Dataset[CachedSequence]):
    """A cache as torch's data loaders take it: its sequences by their numbers, and an empty one, `EMPTY`."""

    def __init__(self, cache: Cache) -> None:
        """Wrap an open cache."""
        self.cache = cache

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.cache)

    def __getitem__(self, index: int | None) -> CachedSequence:
        """Read a sequence."""
        return self._empty if index is EMPTY else self.cache[index]

    @cached_property
    def _empty(self) -> CachedSequence:
        first = self.cache[0]
        return CachedSequence(first.token_ids[:0], first.target_mask[:0], first.targets[:0])


class ShuffledOrder(Sampler[int]):
    """All sequences in an order that follows from seed, epoch and their number alone.

    The state is one number, how many sequences were consumed. A run that skips that many goes on in the same order,
    whatever the number of ranks, of workers, or of sequences in a batch.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        """Begin with epoch 0."""
        self.num_sequences = num_sequences
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.num_sequences

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the sequences."""
        return iter(self._generator().permutation(self.num_sequences).tolist())

    def _generator(self) -> np.random.Generator:
        key = np.array([self.seed % 2**64, self.epoch], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class WindowShuffledOrder(ShuffledOrder):
    """An order that needs few shards at a time: the shards are shuffled, and `window` of them at a time as one.

    It follows from seed, epoch, and the shard of every sequence alone, with the same state. It mixes less than a full
    shuffle: sequences of different windows never mix. The shards of each window are drawn again every epoch. A cache
    that has no more shards than a window is shuffled as a whole.

    `prepare` is called with the shards of the window that begins and of the next one, in a thread, so that they are
    at hand when their sequences are read. Its errors are dropped here: reading the sequence raises them again.
    """

    def __init__(
        self,
        shards: npt.NDArray[np.integer[Any]],
        seed: int,
        window: int = WINDOW_SHARDS,
        prepare: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Begin with epoch 0."""
        super().__init__(len(shards), seed)
        self._shards = shards
        self._window = window
        self._prepare = prepare

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the sequences."""
        generator = self._generator()
        order = generator.permutation(np.unique(self._shards))
        background = ThreadPoolExecutor(1)
        waiting: list[Future[None]] = []
        try:
            for start in range(0, len(order), self._window):
                for future in waiting:  # those of a window that was skipped
                    future.cancel()
                ahead = order[start : start + 2 * self._window].tolist()
                waiting = [background.submit(self._prepare, shard) for shard in ahead]
                members = np.flatnonzero(np.isin(self._shards, order[start : start + self._window]))
                yield from generator.permutation(members).tolist()
        finally:
            background.shutdown(wait=False, cancel_futures=True)


def training_order(cache: Cache, seed: int) -> ShuffledOrder:
    """Return the order in which to train: a full shuffle of a local cache, one by windows of a remote one."""
    if not isinstance(cache.store, RemoteStore):
        return ShuffledOrder(len(cache), seed)
    num_shards = len(np.unique(cache.shards))
    num_staged = min(num_shards, 3 * WINDOW_SHARDS)  # the last batches of the window before are still being read
    needed_gb = sum(cache.bytes_by_array.values()) / num_shards * num_staged / 1e9
    staging = cache.store.staging
    if needed_gb > staging.limit_gb:
        what = f"{num_staged} shards of {cache.root} take {needed_gb:.3g} GB, but the limit of {staging.folder} is"
        logger.warning(
            "%s %g GB: some shards are fetched again and again; raise the limit (staging_gb)", what, staging.limit_gb
        )
    return WindowShuffledOrder(cache.shards, seed, prepare=cache.prepare)


def order_name(cache: Cache) -> str:
    """Return what `training_order` follows from beside the seed: two caches of one name are read in one order."""
    if not isinstance(cache.store, RemoteStore):
        return "shuffled"
    return f"by windows of shards {hash_bytes([cache.shards.astype('<i8').tobytes()])}"


class FilledOrder(Sampler[int | None]):
    """An order of sequences, filled up with `EMPTY` to a multiple of what all ranks take at once.

    Without that, a rank that runs out of sequences would start from the first again, and these would count twice.
    """

    def __init__(self, order: ShuffledOrder | range, multiple: int) -> None:
        """Fill up an order."""
        self.order = order
        self.multiple = multiple

    def __len__(self) -> int:
        """Return the number of sequences, empty ones included."""
        return -(-len(self.order) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int | None]:
        """Yield the numbers of the sequences."""
        return itertools.chain(self.order, itertools.repeat(EMPTY, len(self) - len(self.order)))


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Place sequences of these lengths into rows by first-fit-decreasing; return the members of each row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = (row for row in range(len(rows)) if free[row] >= lengths[index])
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max(row_length, lengths[index]))
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


@dataclass(frozen=True, slots=True)
class Collator:
    """Cached sequences in, one batch out.

    With `pack`, several sequences share a row, each counted from position 0: that, with no attention mask and no
    key-value cache, is what makes transformers keep them apart. `one_row` puts all into a single row, as attention
    kernels for variable lengths want it, and with `bounds` says where each begins, so that no layer has to read that
    from the device; else rows are as long as the longest sequence, so that the cost of attention stays that of separate
    sequences. Without `pack` every sequence has its own row, padded on the right, and without `positions` there are no
    position_ids, for models that count them themselves.
    """

    pack: bool = True
    one_row: bool = False
    positions: bool = True
    bounds: bool = False

    def __call__(self, sequences: Sequence[CachedSequence]) -> Batch:
        """Return the batch.

        `input_ids`, `position_ids` [row, seq]; `target_positions` [target], counted over the flattened rows;
        `labels` [target], the tokens that follow them; the targets by the names of `SparseTargets`; `num_tokens` [1];
        and where the row is one, `bounds` [sequence + 1], where each begins, and `longest`, the tokens of the longest.
        """
        lengths = [len(sequence.token_ids) for sequence in sequences]
        longest = max(sum(lengths) if self.one_row else max(lengths), 1)  # models do not read empty rows
        rows = pack_rows(lengths, longest) if self.pack else [[index] for index in range(len(lengths))]
        # A row is filled up with a token of the batch: a pad's embedding may be 0, where a norm has no gradient.
        filling = next((int(sequence.token_ids[0]) for sequence in sequences if len(sequence.token_ids)), 0)
        input_ids = np.full((len(rows), longest), filling, np.int64)
        position_ids = np.zeros((len(rows), longest), np.int64)
        order: list[int] = []
        target_positions, labels = [], []
        for row, members in enumerate(rows):
            start = 0
            for index in members:
                sequence, stop = sequences[index], start + lengths[index]
                input_ids[row, start:stop] = sequence.token_ids
                position_ids[row, start:stop] = np.arange(lengths[index])
                columns = np.flatnonzero(sequence.target_mask)
                target_positions.append(row * longest + start + columns)
                labels.append(sequence.token_ids[columns + 1].astype(np.int64))
                order.append(index)
                start = stop
            # The rest of the row is filled with one more sequence, whose logits are never used.
            position_ids[row, start:] = np.arange(longest - start) if self.pack else np.arange(start, longest)
        targets = TargetRows.concatenate([sequences[index].targets for index in order])
        return {
            "input_ids": torch.from_numpy(input_ids),
            **({"position_ids": torch.from_numpy(position_ids)} if self.positions else {}),
            **(_bounds([lengths[index] for index in order]) if self.bounds else {}),
            "target_positions": torch.from_numpy(np.concatenate(target_positions)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "num_tokens": torch.tensor([sum(lengths)]),
            **{name: torch.from_numpy(values) for name, values in targets.arrays().items()},
        }


def model_inputs(batch: Batch) -> Batch:
    """Return what a model reads of a batch, by the names that transformers gives it."""
    inputs: Batch = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if "bounds" in batch:
        inputs |= {f"cu_seq_lens_{side}": batch["bounds"] for side in ("q", "k")}
        inputs |= {f"max_length_{side}": batch["longest"] for side in ("q", "k")}
    return inputs


def _bounds(lengths: Sequence[int]) -> Batch:
    """Return where the sequences of a single row begin and end; a row without sequences has one token."""
    kept = [length for length in lengths if length] or [1]
    return {"bounds": torch.tensor([0, *itertools.accumulate(kept)], dtype=torch.int32), "longest": max(kept)}


def batch_targets(batch: Batch, cache: Cache) -> SparseTargets:
    """Return the targets of a batch, on its device; ids travel there in the few bytes that they are stored in."""
    settings = cache.manifest.settings
    tail_ids, tail_logprobs = batch.get("tail_ids"), batch.get("tail_logprobs")
    return SparseTargets(
        ids=batch["ids"].long(),
        logprobs=batch["logprobs"],
        tail_logsumexp=batch["tail_logsumexp"],
        temperatures=settings.temperatures,
        tail_ids=None if tail_ids is None else tail_ids.long(),
        tail_logprobs=tail_logprobs,
        tail_temperature=settings.tail_temperature,
    )


def prefetch(batches: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield what `batches` yields, made up to `depth` ahead in a thread; its errors are raised here.

    The first batch is made in the thread of the caller: torch's loaders draw a seed for it, and the order of draws must
    not depend on threads.
    """
    end: Any = object()
    if (first := next(batches, end)) is end:
        return
    yield first
    with ThreadPoolExecutor(1) as background:
        ahead = deque(background.submit(next, batches, end) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not end:
            ahead.append(background.submit(next, batches, end))
            yield batch
