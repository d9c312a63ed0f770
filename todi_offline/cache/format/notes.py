"""The state of an attempt at a shard in, its note out, and back.

A process leaves a note before it captures a shard and deletes the note after the commit. A note that is found later
names the place where that process died: nothing else of the process is left.
"""

import json
from dataclasses import dataclass
from typing import Any

from todi_offline.cache.format.records import count
from todi_offline.errors import CacheFormatError

MAX_NOTE_BYTES = 2**20
_MAX_ENDED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What is known of a shard if the process that writes this note dies."""

    shard: int
    num_examples: int
    """Examples that were planned for the shard."""
    ended: tuple[int | None, ...]
    """For each process that died at the shard, the example that it was reading by itself; None for the whole shard."""
    num_read: int = 0
    """The first examples of the shard, each read by itself without a death."""
    left_out: tuple[int, ...] = ()
    """Examples that are not to be captured, because each process that read one of them died."""
    was_named: bool = False
    """Whether a run has already told the user of the example that ended the last two processes."""

    def to_bytes(self) -> bytes:
        """Return the note as JSON; of the deaths, the last ones."""
        values = {name: getattr(self, name) for name in self.__slots__} | {"ended": self.ended[-_MAX_ENDED:]}
        return (json.dumps(values) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, shard: int, where: str) -> "Note":
        """Read the bytes that `to_bytes` wrote for a shard.

        Raises:
            CacheFormatError: the bytes are no such note.
        """
        try:
            return cls(**_read_fields(json.loads(data), shard))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CacheFormatError(
                f"{where} is not a note on shard {shard}: {error}; `todi-cache repair` deletes it"
            ) from error


def _read_fields(values: Any, shard: int) -> dict[str, Any]:
    """Check the fields of a note; a cache may come from anywhere, so every value is checked."""
    if values.keys() != set(Note.__slots__):
        raise ValueError(f"its fields are {list(values)!r:.200}")
    if count(values["shard"]) != shard:
        raise ValueError(f"it describes shard {values['shard']}")
    num_examples, ended, left_out = count(values["num_examples"]), values["ended"], values["left_out"]
    if not isinstance(ended, list) or not isinstance(left_out, list) or not isinstance(values["was_named"], bool):
        raise ValueError("a list or a truth value has the wrong type")
    numbers = [*(number for number in ended if number is not None), *left_out]
    if len(ended) > _MAX_ENDED or count(values["num_read"]) > num_examples:
        raise ValueError(f"it has {len(ended)} deaths, and {values['num_read']} of {num_examples} examples read")
    if any(count(number) >= num_examples for number in numbers) or left_out != sorted(set(left_out)):
        raise ValueError(f"it names examples beyond the {num_examples} of the shard, or one of them twice")
    return {**values, "ended": tuple(ended), "left_out": tuple(left_out)}
