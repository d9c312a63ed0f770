"""Sequences of a cache in, rows for the writer of another cache out."""

from collections.abc import Iterator, Sequence

from todi_offline.cache.format.sequences import SequenceRows
from todi_offline.cache.reader import Cache, read_all


def sequence_rows(cache: Cache, indices: Sequence[int]) -> Iterator[SequenceRows]:
    """Yield sequences of a cache in the form that a writer takes."""
    for index, sequence in zip(indices, read_all(cache, indices), strict=True):
        name, source = (cache.sequences[column][index].as_py() for column in ("id", "source"))
        yield SequenceRows(name, source, sequence.token_ids, sequence.target_mask, sequence.targets)
