"""What is wrong with a cache, and what mends it: the nouns of `verify` and `repair`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Remedy:
    """What mends a problem."""

    text: str
    drop: tuple[str, ...] = ()
    """The objects that `todi-cache repair` deletes for it."""
    shard: int | None = None
    """The shard that repair takes out of the cache, so that the capture makes it anew."""
    renews: bool = False
    """Whether repair writes the object again, from what the cache still has."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a cache; or, as a note, something to know about its place."""

    where: str
    """An object, or a sequence."""
    what: str
    """What was found, and what was expected."""
    remedy: Remedy
    is_note: bool = False
    """Whether the cache is whole in spite of it."""


NOTHING = Remedy("nothing needs to be done")


def redo(shard: int) -> Remedy:
    """Return the remedy of a damaged shard."""
    return Remedy(f"`todi-cache repair`, then the same capture again: it redoes shard {shard} alone", (), shard)
