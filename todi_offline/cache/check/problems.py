"""Problems of a cache and their remedies: the nouns of `verify` and `repair`."""

from dataclasses import dataclass

from todi_offline.errors import CacheCorruptError, CacheError, CacheFormatError, CacheIncompleteError


@dataclass(frozen=True, slots=True)
class Remedy:
    """The way to mend a problem."""

    text: str
    drop: tuple[str, ...] = ()
    """The objects that `todi-cache repair` deletes."""
    shard: int | None = None
    """The shard that `repair` takes out of the cache, so that the capture writes it again."""
    renews: bool = False
    """Whether `repair` writes the object again, from the other objects of the cache."""
    by_hand: bool = False
    """Whether neither `repair` nor a capture can mend the problem."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage to a cache; or, as a note, a fact about its place that is no damage."""

    where: str
    """An object, or a sequence."""
    what: str
    """The state that was found, and the expected one."""
    remedy: Remedy
    is_note: bool = False
    """Whether the cache is whole all the same."""


NOTHING = Remedy("nothing needs to be done")
GO_ON = Remedy("run the same capture again: it continues")
RENEW = Remedy("run `todi-cache repair`: it writes the object again", renews=True)
RESTORE = Remedy("restore the object from a copy, or capture into another folder", by_hand=True)
READ_AGAIN = Remedy(
    "fix the disk, the permissions or the network and verify again; if the object is lost for good, delete it and run "
    "`todi-cache repair`",
    by_hand=True,
)
"""An object that cannot be read may be whole, so `repair` leaves it where it is."""


def redo(shard: int) -> Remedy:
    """Return the remedy of a damaged shard."""
    return Remedy(
        f"run `todi-cache repair`, then the same capture again: it writes only shard {shard} again", shard=shard
    )


def drop(key: str) -> Remedy:
    """Return the remedy of an object that the cache does not need."""
    return Remedy("run `todi-cache repair`: it deletes the object", drop=(key,))


def remedy_of(error: CacheError, if_damaged: Remedy) -> Remedy:
    """Return the remedy for an error of reading: `if_damaged` for damage and loss, else to read again."""
    is_damaged = isinstance(error, CacheCorruptError | CacheFormatError | CacheIncompleteError)
    return if_damaged if is_damaged else READ_AGAIN
