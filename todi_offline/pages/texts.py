"""Token ids in, texts out that people can read and that cannot do harm.

The text of a data set is not trusted: a bidi override reverses what follows, and a control character is invisible. So
every character that is not a letter, mark, number, punctuation, symbol or plain space is written as ⟨U+202E⟩.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from todi_offline.cache.objects import read_root, read_tokenizer
from todi_offline.cache.reader import Cache
from todi_offline.errors import CacheError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens
_SHOWN_LENGTH = 200
_HIDDEN = ("C", "Z")  # categories: control, format, surrogate, private, unassigned; spaces and separators


def printable(text: str) -> str:
    """Return a text with every character that cannot be seen written as ⟨U+202E⟩, but spaces, tabs, line ends."""
    if text.isprintable():  # a space is the only separator that is
        return text
    return "".join(character if _can_be_seen(character) else f"⟨U+{ord(character):04X}⟩" for character in text)


def _can_be_seen(character: str) -> bool:
    return character in " \n\t" or not unicodedata.category(character).startswith(_HIDDEN)


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that one token is, or several together where each is part of one character."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The texts of a tokenizer's ids; without a tokenizer, the ids themselves."""

    tokenizer: "Tokenizer | None"

    def of_id(self, number: int) -> str:
        """Return the text of an id by itself: bytes that are no character as \\xE2\\x98."""
        if self.tokenizer is None:
            return f"[{number}]"
        name: str = self.tokenizer.id_to_token(number) or ""
        text: str = self.tokenizer.decode([number], skip_special_tokens=False)
        if BROKEN in text and BROKEN not in name:
            return _as_bytes(name)[:_SHOWN_LENGTH]
        if name.startswith("▁") and not text.startswith(" "):
            text = " " + text
        return (text or name or f"[{number}]")[:_SHOWN_LENGTH]

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """Return the text of a sequence in pieces, in order; their numbers of tokens add up to that of the ids."""
        if self.tokenizer is None:
            return [Piece(f"[{number}] ", 1) for number in ids]
        found: list[Piece] = []
        start = before = 0  # of this piece, and of the one before it, which a decoder may join to it
        while start < len(ids):
            piece = self._piece(ids, before, start)
            found.append(piece)
            before, start = start, start + piece.num_tokens
        return found

    def _piece(self, ids: Sequence[int], before: int, start: int) -> Piece:
        context = self._decoded(ids[before:start])
        for num_tokens in range(1, _LONGEST_CHARACTER + 1):
            if start + num_tokens > len(ids):
                break
            text = self._decoded(ids[before : start + num_tokens])
            text = text[len(context) :] if text.startswith(context) else self._decoded(ids[start : start + num_tokens])
            if BROKEN not in text:
                return Piece((text or self.of_id(ids[start]))[:_SHOWN_LENGTH], num_tokens)
        return Piece(self.of_id(ids[start]), 1)

    def _decoded(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def cache_texts(cache: Cache) -> TokenTexts:
    """Return the texts of the tokenizer that a cache holds, or the ids alone where it holds none.

    Raises:
        CacheError: what it holds is no tokenizer.
    """
    from tokenizers import Tokenizer

    stored = read_tokenizer(cache.store, read_root(cache.store))
    if stored is None:
        return TokenTexts(None)
    try:
        return TokenTexts(Tokenizer.from_str(stored))
    except Exception as error:  # what the package raises has no narrower class
        raise CacheError(f"the tokenizer.json of {cache.root} cannot be read: {first_line(error)}") from error


def _as_bytes(name: str) -> str:
    """Return the bytes of an entry of a vocabulary: it is one byte, or byte-level BPE, a letter for each."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return f"\\x{found[1]}"
    letters = _bytes_of_letters()
    return "".join(f"\\x{letters[letter]:02X}" for letter in name) if letters.keys() >= set(name) else name


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Return the alphabet of byte-level BPE: printable bytes of Latin-1 are themselves, others letters from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}
