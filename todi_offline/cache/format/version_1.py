"""The metadata of a format 1 cache in, the root that the cache would have today out.

Format 1 has no `cache.json`. The manifest lies in `zarr.json`, `sealed.json` names the commit records once all shards
are there, and `append.json` holds the manifest that a later capture had begun to make.
"""

import json
from collections.abc import Callable
from typing import Any

from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.names import APPEND_KEY, GROUP_KEY, SEALED_KEY, TOKENIZER_KEY, record_key
from todi_offline.cache.format.records import ObjectSum, count
from todi_offline.cache.format.root import Root
from todi_offline.errors import CacheCorruptError, CacheFormatError

ATTRIBUTE = "todi_offline"  # of the Zarr group

Read = Callable[[str], bytes | None]
"""Returns an object by its key, or None where there is none."""


def read_version_1(read: Read, where: str) -> Root:
    """Return the root of a format 1 cache.

    Raises:
        CacheFormatError: there is no cache of format 1.
        CacheCorruptError: `zarr.json` has changed since the cache was sealed.
    """
    group = read(GROUP_KEY)
    manifest = _manifest(group, where)
    begun = manifest if (data := read(APPEND_KEY)) is None else _manifest(data, where)
    if (sealed := read(SEALED_KEY)) is None:
        return Root(manifest=_with_parts(manifest, ()), pending=begun.parts)
    num_shards, objects = _seal(sealed, f"{where}/{SEALED_KEY}")
    finished = _finished(manifest.parts, num_shards)
    if finished is None:
        raise CacheFormatError(
            f"{where}/{SEALED_KEY} seals {num_shards} shards, but zarr.json has no parts with so many shards"
        )
    expected = objects.get(GROUP_KEY) if finished == manifest.parts else None  # an append may have renewed it
    if expected is not None and (difference := expected.difference(group or b"")):
        raise CacheCorruptError(f"{where}/{GROUP_KEY} is damaged: {difference}; restore it from a copy")
    return Root(
        manifest=_with_parts(manifest, finished),
        commits=tuple(objects.get(record_key(shard)) for shard in range(num_shards)),
        pending=begun.parts[len(finished) :],
        tokenizer=objects.get(TOKENIZER_KEY),
    )


def _manifest(data: bytes | None, where: str) -> Manifest:
    try:
        values = json.loads(data or b"")["attributes"][ATTRIBUTE]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheFormatError(
            f"{where} is not a cache: it has no cache.json; name the folder or URL that `todi capture` wrote"
        ) from error
    return Manifest.from_json(values, where)


def _with_parts(manifest: Manifest, parts: tuple[Part, ...]) -> Manifest:
    """Return the manifest as format 2 has it."""
    return Manifest(
        settings=manifest.settings,
        vocab_size=manifest.vocab_size,
        teacher=manifest.teacher,
        tokenizer=manifest.tokenizer,
        parts=parts,
    )


def _seal(data: bytes, where: str) -> tuple[int, dict[str, ObjectSum]]:
    try:
        values: Any = json.loads(data)
        objects = {str(key): ObjectSum.from_json(entry) for key, entry in values["objects"].items()}
        num_shards = count(values["num_shards"])
        if any(record_key(shard) not in objects for shard in range(min(num_shards, len(objects) + 1))):
            raise ValueError(f"it says {num_shards} shards and names fewer commit records")
        return num_shards, objects
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheFormatError(f"{where} cannot be read: {error}") from error


def _finished(parts: tuple[Part, ...], num_shards: int) -> tuple[Part, ...] | None:
    """Return the first parts that together have so many shards; None where there are none."""
    for number in range(len(parts) + 1):
        if sum(part.num_shards for part in parts[:number]) == num_shards:
            return parts[:number]
    return None
