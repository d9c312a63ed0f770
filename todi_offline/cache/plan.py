"""Lengths of sequences in, their places in shards out, before the teacher runs.

A shard holds `shard_tokens` tokens and as many targets; a sequence never crosses a shard. Sequences keep the order
of the data set, so the plan follows from the lengths alone, and every shard can be captured by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from todi_offline.errors import DataError


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The examples `start` to `stop` of a data set lie in shard `index`."""

    index: int
    start: int
    stop: int

    @property
    def examples(self) -> range:
        """Their positions in the data set."""
        return range(self.start, self.stop)


def plan_shards(num_tokens: Sequence[int], shard_tokens: int) -> list[ShardPlan]:
    """Fill shards with examples of these lengths, in order.

    Raises:
        DataError: there is nothing to place, or an example is longer than a shard.
    """
    if not len(num_tokens):
        raise DataError("there is no example to capture: the data set is empty, or all of it was dropped")
    shards: list[ShardPlan] = []
    start = used = 0
    for position, length in enumerate(num_tokens):
        if length > shard_tokens:
            raise DataError(
                f"example {position} has {length} tokens, more than the {shard_tokens} that a shard holds; "
                "lower max_length or raise shard_tokens"
            )
        if used + length > shard_tokens:
            shards.append(ShardPlan(len(shards), start, position))
            start, used = position, 0
        used += int(length)
    return [*shards, ShardPlan(len(shards), start, len(num_tokens))]
