"""Wide rows in, narrower rows out: fewer entries, temperatures or tail samples."""

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.errors import CacheMismatchError


def narrow(rows: TargetRows, settings: CacheSettings, content_key: bytes) -> TargetRows:
    """Return the rows as a capture with these settings would have kept them.

    Dropped entries move into the tail: log sum exp(l / T) over the dropped entries and the old tail, exact up to the
    rounding of the stored log-probs. The stored samples were drawn from the old tail. To be draws from the new tail,
    each of them stays with a probability of the old tail's share of the new one; otherwise a dropped id takes its
    place, drawn in proportion to p^(1/T) at `tail_temperature`. The random numbers are a function of `content_key`,
    the seed of the settings and both widths. Without the widths, a second narrowing would use the same numbers again,
    and some ids could never be drawn.

    Raises:
        CacheMismatchError: the rows hold less than the settings ask for; names what is missing.
    """
    require_enough(rows, settings)
    columns = [rows.temperatures.index(temperature) for temperature in settings.temperatures]
    kept, dropped = rows.logprobs[:, : settings.k], rows.logprobs[:, settings.k :].astype(np.float64)
    tail = rows.tail_logsumexp[:, columns]
    if dropped.shape[1]:
        parts = [np.logaddexp.reduce(dropped / temperature, axis=1) for temperature in settings.temperatures]
        tail = np.logaddexp(tail, np.stack(parts, axis=1)).astype(np.float32)
    narrowed = dataclasses.replace(
        rows,
        ids=rows.ids[:, : settings.k],
        logprobs=kept,
        tail_logsumexp=tail,
        temperatures=settings.temperatures,
        tail_ids=None if rows.tail_ids is None else rows.tail_ids[:, : settings.tail_samples],
        tail_logprobs=None if rows.tail_logprobs is None else rows.tail_logprobs[:, : settings.tail_samples],
    )
    if not settings.tail_samples:
        return dataclasses.replace(narrowed, tail_ids=None, tail_logprobs=None)
    return _with_dropped_samples(narrowed, rows, settings, content_key) if dropped.shape[1] else narrowed


def require_enough(rows: TargetRows, settings: CacheSettings) -> None:
    """Refuse rows that hold less than the settings ask for."""
    samples = 0 if rows.tail_ids is None else rows.tail_ids.shape[1]
    missing = [f"{t:g}" for t in settings.temperatures if t not in rows.temperatures]
    lacks = [
        *([f"k = {rows.ids.shape[1]}, not {settings.k}"] if rows.ids.shape[1] < settings.k else []),
        *([f"no tail at the temperatures {', '.join(missing)}"] if missing else []),
        *([f"{samples} tail samples, not {settings.tail_samples}"] if samples < settings.tail_samples else []),
    ]
    if settings.tail_samples and rows.tail_temperature != settings.tail_temperature:
        lacks.append(f"samples drawn at temperature {rows.tail_temperature:g}, not {settings.tail_temperature:g}")
    if lacks:
        raise CacheMismatchError(f"the cache holds {'; '.join(lacks)}; request what it holds or less, or capture again")


def _with_dropped_samples(
    narrowed: TargetRows, rows: TargetRows, settings: CacheSettings, content_key: bytes
) -> TargetRows:
    """Replace samples by dropped ids, in proportion to the share of these in the new tail."""
    assert narrowed.tail_ids is not None, "there are samples"
    assert narrowed.tail_logprobs is not None, "and their log-probs"
    dropped = rows.logprobs[:, settings.k :].astype(np.float64)
    tail = rows.tail_logsumexp[:, [rows.temperatures.index(settings.tail_temperature)]].astype(np.float64)
    weights = np.exp(dropped / settings.tail_temperature)
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1:] + np.exp(tail)
    reached = _uniforms(content_key, settings, rows.ids.shape[1], narrowed.tail_ids.shape) * total
    # One sample after the other: all at once would take [target, sample, k].
    place = np.stack([(column[:, None] >= cumulative).sum(axis=1) for column in reached.T], axis=1)
    replaced = place < dropped.shape[1]
    place = np.where(replaced, place, 0)
    ids = np.take_along_axis(rows.ids[:, settings.k :], place, axis=1)
    logprobs = np.take_along_axis(rows.logprobs[:, settings.k :], place, axis=1)
    return dataclasses.replace(
        narrowed,
        tail_ids=np.where(replaced, ids, narrowed.tail_ids),
        tail_logprobs=np.where(replaced, logprobs, narrowed.tail_logprobs),
    )


def _uniforms(
    content_key: bytes, settings: CacheSettings, width: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Return uniform numbers of [0, 1) for narrowing rows from `width` entries to the k of the settings."""
    widths = width.to_bytes(4, "little") + settings.k.to_bytes(4, "little")
    seed = settings.tail_seed.to_bytes(8, "little")
    key = hashlib.blake2b(content_key + widths, digest_size=16, key=b"narrow", salt=seed)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key.digest(), "little"))).random(shape)
