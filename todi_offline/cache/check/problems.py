"""What is wrong with a cache, and what mends it: the nouns of `verify` and `repair`."""

from dataclasses import dataclass

from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError


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
    by_hand: bool = False
    """Whether neither repair nor a capture can mend it."""


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
GO_ON = Remedy("run the same capture again: it goes on")
RENEW = Remedy("`todi-cache repair` writes it again", renews=True)
RESTORE = Remedy("bring it back from a copy, or capture into another folder", by_hand=True)
READ_AGAIN = Remedy(
    "mend the disk, the permissions or the network and verify again; if the object is lost for good, delete it and run "
    "`todi-cache repair`",
    by_hand=True,
)
"""An object that cannot be read may be whole, so repair leaves it where it is."""


def redo(shard: int) -> Remedy:
    """Return the remedy of a damaged shard."""
    return Remedy(f"`todi-cache repair`, then the same capture again: it redoes shard {shard} alone", shard=shard)


def drop(key: str) -> Remedy:
    """Return the remedy of an object that the cache does not need."""
    return Remedy("`todi-cache repair` deletes it", drop=(key,))


def remedy_of(error: CacheError, if_damaged: Remedy) -> Remedy:
    """Return what mends an object whose reading raised an error: only damage and loss are damage."""
    is_damaged = isinstance(error, CacheCorruptError | CacheFormatError | CacheIncompleteError)
    return if_damaged if is_damaged else READ_AGAIN
