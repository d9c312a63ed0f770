"""Caches of a fake teacher, each with a plain list of the rows that it must hold.

An `Entry` names the fake sequence of a row and the encodings that the row went through. `assert_holds` compares a cache
with entries. Where the encoding never changed, numbers must be equal; else they must lie within the bounds of all
encodings.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from support.fake_cache import VOCAB, manifest, sequence, settings
from support.stopping import StoppedError
from todi_offline.cache.format.encoding import decode_rows, encode_rows
from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Part
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence, SequenceRows
from todi_offline.cache.planning import plan_capture
from todi_offline.cache.reader import Cache
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.cache.writer import CacheWriter

# Numbers of fake sequences by how their content keys end; found by search, one key in 256 ends in a zero byte.
ONE_ZERO = (
    100,
    129,
    261,
    829,
    848,
    1073,
    1287,
    1357,
    1416,
    2032,
    2091,
    2412,
    3781,
    4310,
    4396,
    4632,
    4696,
    4814,
    5010,
    5429,
)
TWO_ZEROS = (152891, 178181, 181206, 212849, 220018, 268996, 501264, 573894)
THREE_ZEROS = (11,)
_CHOSEN_TOKENS = {11: {9: 290, 16: 237, 17: 235}}
"""Tokens to put in, by place, so that the key ends in three zero bytes; no target depends on these tokens."""

TINY = 10**6
"""Sequences from this number on have eight tokens and are made quickly."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """A sequence of a cache: the number of the fake sequence, the settings of its capture, and all its encodings."""

    number: int
    origin: CacheSettings
    encodings: tuple[str, ...]

    @classmethod
    def captured(cls, number: int, origin: CacheSettings) -> "Entry":
        return cls(number, origin, (origin.encoding,))

    @property
    def key(self) -> bytes:
        return key_of(self.number)

    def stored_as(self, encoding: str) -> "Entry":
        """Return the entry after it was stored in an encoding."""
        if encoding == self.encodings[-1]:
            return self
        return dataclasses.replace(self, encodings=(*self.encodings, encoding))


@cache
def made(number: int, chosen: CacheSettings) -> SequenceRows:
    if number >= TINY:
        return _tiny(number, chosen)
    row = sequence(number, chosen)
    token_ids = row.token_ids.copy()
    for place, token in _CHOSEN_TOKENS.get(number, {}).items():
        token_ids[place] = token
    return dataclasses.replace(row, token_ids=token_ids)


def _tiny(number: int, chosen: CacheSettings) -> SequenceRows:
    """Return the first tokens of one of 64 sequences, with a first token of its own, on which no target depends."""
    row = made((number - TINY) % 64, chosen)
    token_ids, mask = row.token_ids[:8].copy(), row.target_mask[:8].copy()
    token_ids[0], mask[-1] = (number - TINY) // 64 % VOCAB, False
    return SequenceRows(f"fake:{number}", "fake", token_ids, mask, row.targets[: int(mask.sum())])


@cache
def key_of(number: int) -> bytes:
    return made(number, settings()).content_key


@cache
def length_of(number: int) -> int:
    return len(made(number, settings()).token_ids)


def digest_of(numbers: Sequence[int]) -> str:
    """Return the hash of a data set, computed from the bytes of its content keys alone."""
    return blake2b(b"".join(map(key_of, numbers)), digest_size=16).hexdigest()


def capture_into(
    root: Path | str,
    numbers: Sequence[int],
    chosen: CacheSettings,
    reuse: Sequence[Path | str] = (),
    stop_after: int | None = None,
    stretch: int = 1,
) -> None:
    """Capture fake sequences as `capture` does; after `stop_after` shards the work stops without a seal.

    The plan counts every sequence `stretch` times as long as it is, so that few sequences fill a shard.
    """
    bare = dataclasses.replace(manifest(chosen), parts=())
    reused = open_reusable([str(place) for place in reuse], bare)
    keys = ContentKeys.of(map(key_of, numbers))
    part = Part(
        recipe={"source": "fake"}, content=keys.digest(), num_sequences=len(numbers), num_shards=0, versions={"v": "0"}
    )
    lengths = np.array([min(length_of(number) * stretch, chosen.shard_tokens) for number in numbers])
    plan = plan_capture(open_store(root), dataclasses.replace(bare, parts=(part,)), keys, lengths)
    places = np.full(len(keys), -1) if reused is None else reused.content_keys.find(keys)
    with CacheWriter(root, plan.manifest) as writer:
        missing = set(writer.missing_shards())
        for done, shard in enumerate(shard for shard in plan.shards if shard.index in missing):
            if done == stop_after:
                raise StoppedError
            rows = []
            for member in plan.sequences[shard.start : shard.stop].tolist():
                row = made(numbers[member], chosen)
                if reused is not None and places[member] >= 0:
                    row = dataclasses.replace(row, targets=reused[int(places[member])].targets)
                rows.append(row)
            writer.write_shard(shard.index, rows)
        if stop_after is not None:
            raise StoppedError
        writer.seal()


def assert_holds(found: Cache, entries: Sequence[Entry]) -> None:
    """Assert that a cache holds these sequences in this order, each with the rows that it must have."""
    assert list(found.content_keys) == [entry.key for entry in entries]
    assert found.sequences["id"].to_pylist() == [f"fake:{entry.number}" for entry in entries]
    for cached, entry in zip(found, entries, strict=True):
        assert_row(cached, entry, found.manifest.settings)


def assert_row(found: CachedSequence, entry: Entry, chosen: CacheSettings) -> None:
    """Assert that a sequence is an entry, narrowed to these settings."""
    expected, base = made(entry.number, entry.origin), stored(entry.number, entry.origin)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.target_mask, expected.target_mask)
    rows, k = found.targets, chosen.k
    assert rows.ids.shape == (len(base), k)
    assert rows.temperatures == chosen.temperatures
    if len(entry.encodings) == 1:
        np.testing.assert_array_equal(rows.ids, base.ids[:, :k])
        np.testing.assert_array_equal(rows.logprobs, base.logprobs[:, :k])
        np.testing.assert_array_equal(rows.label_logprob, base.label_logprob)
    lower, upper = _bounds(entry)
    is_kept = np.zeros(lower.shape, np.bool_)
    np.put_along_axis(is_kept, rows.ids.astype(np.int64), True, axis=1)
    assert (is_kept.sum(axis=1) == k).all()
    _assert_between(rows.logprobs, *(np.take_along_axis(bound, rows.ids, axis=1) for bound in (lower, upper)))
    assert (np.where(is_kept, -np.inf, lower).max(axis=1) <= np.where(is_kept, upper, np.inf).min(axis=1)).all()
    is_coarse = "root8" in entry.encodings
    np.testing.assert_allclose(rows.label_logprob, expected.targets.label_logprob, atol=1 / 32 if is_coarse else 1e-6)
    _assert_tail(rows, base, np.where(is_kept, -np.inf, lower), np.where(is_kept, -np.inf, upper), entry, chosen)
    _assert_samples(rows, base, lower, upper, entry, chosen)


def _assert_tail(
    rows: TargetRows, base: TargetRows, lower: Numbers, upper: Numbers, entry: Entry, chosen: CacheSettings
) -> None:
    for column, temperature in enumerate(chosen.temperatures):
        given = base.tail_logsumexp[:, base.temperatures.index(temperature)]
        if chosen.k == entry.origin.k and len(entry.encodings) == 1:
            np.testing.assert_array_equal(rows.tail_logsumexp[:, column], given)
        slack = 1e-4 + ("root8" in entry.encodings) * 5 / 64  # a rounding of half a step for each operation
        least, most = (np.logaddexp.reduce(bound / temperature, axis=1) for bound in (lower, upper))
        _assert_between(rows.tail_logsumexp[:, column], least - slack, most + slack)


def _assert_samples(
    rows: TargetRows, base: TargetRows, lower: Numbers, upper: Numbers, entry: Entry, chosen: CacheSettings
) -> None:
    """Each sample is the captured sample, or a captured id that the cache no longer keeps; its log-prob is the id's."""
    if not chosen.tail_samples:
        assert rows.tail_ids is None
        return
    assert rows.tail_ids is not None
    assert rows.tail_logprobs is not None
    assert base.tail_ids is not None
    drawn = base.tail_ids[:, : chosen.tail_samples]
    assert rows.tail_ids.shape == drawn.shape
    captured = (rows.tail_ids[:, :, None] == base.ids[:, None, :]).any(axis=2)
    kept = (rows.tail_ids[:, :, None] == rows.ids[:, None, :]).any(axis=2)
    assert ((rows.tail_ids == drawn) | captured).all()
    assert not kept.any()
    if chosen.k == entry.origin.k:
        np.testing.assert_array_equal(rows.tail_ids, drawn)
    least, most = (np.take_along_axis(bound, rows.tail_ids, axis=1) for bound in (lower, upper))
    slack = abs(least) * 2.0**-10 + ("root8" in entry.encodings) / 8
    floor = -31.75 if "root8" in entry.encodings else -np.inf
    _assert_between(rows.tail_logprobs, least - slack, np.maximum(most, floor) + slack)


def _assert_between(values: npt.NDArray[Any], lower: Numbers, upper: Numbers) -> None:
    assert (lower <= values).all(), (values - lower).min()
    assert (values <= upper).all(), (values - upper).max()


@cache
def stored(number: int, origin: CacheSettings) -> TargetRows:
    """Return the rows of a fake sequence as they come back from the cache that captured them."""
    arrays = encode_rows(made(number, origin).targets, origin.encoding)
    specs = manifest(origin).arrays
    kept = {name: values.astype(specs[name].dtype) for name, values in arrays.items()}
    return decode_rows(kept, origin.encoding, origin.temperatures, origin.tail_temperature)


@cache
def _truth(number: int, is_bf16: bool) -> Numbers:
    """Return the teacher's log-probs of a fake sequence, [target, vocab]."""
    rows = made(number, settings(k=VOCAB, tail_samples=0, encoding="bf16_logit" if is_bf16 else "f16")).targets
    logprobs = np.empty(rows.ids.shape)
    np.put_along_axis(logprobs, rows.ids.astype(np.int64), rows.logprobs.astype(np.float64), axis=1)
    return logprobs


@cache
def _bounds(entry: Entry) -> tuple[Numbers, Numbers]:
    """Return the least and the greatest log-prob, [target, vocab], that the entry's encodings can yield."""
    lower = upper = _truth(entry.number, entry.origin.encoding == "bf16_logit")
    for encoding in entry.encodings:
        least, most = _rounded(lower, upper, encoding)
        lower, upper = np.minimum(lower, least), np.maximum(upper, most)
    return lower, upper


def _rounded(lower: Numbers, upper: Numbers, encoding: str) -> tuple[Numbers, Numbers]:
    if encoding == "root8":  # the fourth root is rounded by up to 1/256; 0 is read as a quarter of a step
        return tuple(  # type: ignore[return-value]
            4 * np.log(np.maximum(np.exp(bound / 4) + half / 256, 0.25 / 128))
            for bound, half in ((lower, -1), (upper, 1))
        )
    if encoding == "q8":
        return lower - 1 / 32 - 1e-6, upper + 1 / 32 + 1e-6
    share, least = (2.0**-11, 2.0**-24) if encoding == "f16" else (0, 1e-4)
    return lower - abs(lower) * share - least, upper + abs(upper) * share + least
