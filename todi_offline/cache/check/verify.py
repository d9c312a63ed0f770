"""A cache in, everything that is wrong with it out; memory grows with a shard, not with the cache.

Three rounds: the seal and what it names, the objects of every shard (whole, and no others), and what the shards hold.
A shard with a damaged object is not looked into further than to say which of its chunks are.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.check.invariants import SLACK, faults, mass_bounds
from todi_offline.cache.format.encoding import bounds, decode_rows
from todi_offline.cache.format.fingerprint import content_key, hash_bytes
from todi_offline.cache.format.layout import APPEND_KEY, CHUNK_TARGETS, TOKENIZER_KEY, record_key, sequences_key
from todi_offline.cache.format.manifest import Manifest
from todi_offline.cache.format.records import (
    RECORDS_PREFIX,
    SEAL_KEY,
    CommitRecord,
    ObjectSum,
    Seal,
    committed_shards,
    read_record,
    read_seal,
    to_bytes,
)
from todi_offline.cache.format.shard import ShardFile
from todi_offline.cache.reader import (
    ends_append,
    open_shard,
    read_manifest,
    read_shard_record,
    read_table,
    require_places,
)
from todi_offline.cache.store import LOCK_KEY, Store, open_store
from todi_offline.cache.writer import array_metadata, metadata_keys
from todi_offline.errors import CacheError

_BLOCK_BYTES = 2**22
_STABLE_METADATA = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")  # zarr may add others

Progress = Callable[[int, int], None]
"""Called with the shards looked at so far and all of them."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What it takes to mend something."""

    text: str
    drop: tuple[str, ...] = ()
    """The objects that `todi-cache repair` deletes for it, so that the same capture writes them anew."""
    shard: int | None = None
    """The shard that the capture then makes anew."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a cache."""

    where: str
    """An object, or a sequence."""
    what: str
    """What was found, and what was expected."""
    remedy: Remedy


_GO_ON = Remedy("run the same capture again: it goes on")
_RESEAL = Remedy("`todi-cache repair`, then the same capture again: it seals anew", (SEAL_KEY,))
_RESTORE = Remedy("bring it back from a copy, or capture into another folder")
_COMPARE = Remedy(
    "bring it, or sealed.json, back from a copy; or delete sealed.json: the same capture tells which is right"
)


def verify_cache(place: str | Path | Store, progress: Progress = lambda *_: None) -> list[Problem]:
    """Return everything that is wrong with a cache.

    Raises:
        CacheFormatError: the folder is no cache, or one of another format version.
    """
    with np.errstate(all="ignore"):  # whatever is stored is looked at
        return list(_problems(open_store(place), progress))


def _problems(store: Store, progress: Progress) -> Iterator[Problem]:
    committed = committed_shards(store)
    try:
        manifest = read_manifest(store)
    except CacheError as error:
        if not (committed or store.size(SEAL_KEY) is not None) or is_as_sealed(store, "zarr.json"):
            raise
        yield Problem("zarr.json", str(error), _RESTORE)
        return
    try:
        seal = read_seal(store)
    except CacheError as error:
        yield Problem(SEAL_KEY, str(error), _RESEAL if store.size(SEAL_KEY) is not None else _GO_ON)
        yield from _shards_problems(store, manifest, committed, {}, progress)
        return
    if seal.num_shards < manifest.num_shards and ends_append(store):
        yield Problem(SEAL_KEY, "it is the one before what a capture appended", _GO_ON)
        yield from _shards_problems(store, manifest, committed, {}, progress)
        return
    appended = range(seal.num_shards, manifest_begun(store, manifest).num_shards)
    yield from _seal_problems(store, manifest, seal)
    yield from _metadata_problems(store, manifest, seal)
    yield from _extra_objects(store, manifest, seal, appended)
    yield from _count_problems(store, seal)
    shards = [*range(seal.num_shards), *sorted(set(committed) & set(appended))]
    yield from _shards_problems(store, manifest, shards, seal.objects, progress)


def manifest_begun(store: Store, manifest: Manifest) -> Manifest:
    """Return the manifest that a cache is to have: another one while a capture appends to it."""
    try:
        begun = read_manifest(store, APPEND_KEY)
    except CacheError:  # there is none, as a rule
        return manifest
    return begun if begun.parts[:-1] == manifest.parts else manifest


def is_as_sealed(store: Store, key: str) -> bool:
    """Whether an object has the sum that the seal has of it."""
    try:
        return difference(store, key, read_seal(store).objects[key]) is None
    except (CacheError, KeyError):
        return False


def _seal_problems(store: Store, manifest: Manifest, seal: Seal) -> Iterator[Problem]:
    """Compare the seal with its own bytes, with the manifest, and with what it should name."""
    if store.read(SEAL_KEY) != to_bytes(seal):
        yield Problem(SEAL_KEY, "its values stand in other bytes than those that were written", _RESEAL)
    if seal.num_shards != manifest.num_shards:
        what = f"it is of {seal.num_shards} shards, zarr.json of {manifest.num_shards}"
        yield Problem(SEAL_KEY, what, _RESEAL)
    expected = {*metadata_keys(store, manifest), *map(record_key, range(seal.num_shards))}
    if differing := (expected ^ seal.objects.keys()) - {TOKENIZER_KEY}:  # there or not, as the teacher had it
        yield Problem(SEAL_KEY, f"it does not name what it should: {', '.join(sorted(differing))}", _RESEAL)


def _metadata_problems(store: Store, manifest: Manifest, seal: Seal) -> Iterator[Problem]:
    """Compare the metadata with their sums in the seal, and those of the arrays with the manifest."""
    for key, expected_sum in seal.objects.items():
        if key.startswith(RECORDS_PREFIX):
            continue  # looked at with their shards
        if what := difference(store, key, expected_sum):
            yield Problem(key, what, _COMPARE if key == "zarr.json" else _rewrite(key))
        elif key.endswith("/zarr.json") and (name := key.partition("/")[0]) in manifest.arrays:
            implied = array_metadata(manifest.arrays[name], manifest.settings.codec, seal.num_shards)
            if _stable(implied) != _stable(store.read(key)):
                yield Problem(key, "it is not what the manifest leads to", _rewrite(key))


def _stable(metadata: bytes) -> list[Any] | None:
    try:
        values = json.loads(metadata)
        return [values[name] for name in _STABLE_METADATA]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _extra_objects(store: Store, manifest: Manifest, seal: Seal, appended: range) -> Iterator[Problem]:
    """Whatever lies there and belongs neither to a shard of a finished cache nor to one that is being appended."""
    known = {SEAL_KEY, LOCK_KEY, *seal.objects, *([APPEND_KEY] if appended else [])}
    for shard in (*range(seal.num_shards), *appended):
        known |= {record_key(shard), *object_keys(manifest, shard)}
    for key in store.find():
        if key not in known:
            yield Problem(key, "no record names it", Remedy("`todi-cache repair` deletes it", (key,)))


def _count_problems(store: Store, seal: Seal) -> Iterator[Problem]:
    found, expected = [seal.num_sequences, seal.num_tokens, seal.num_targets], [0, 0, 0]
    try:
        for shard in range(seal.num_shards):
            record = read_record(store, record_key(shard))
            counts = (record.num_sequences, record.num_tokens, record.num_targets)
            expected = [total + count for total, count in zip(expected, counts, strict=True)]
    except CacheError:
        return  # named where the shards are looked at
    if found != expected:
        what = f"it has other numbers of sequences, tokens and targets, {found}, than the records, {expected}"
        yield Problem(SEAL_KEY, what, _RESEAL)


def _shards_problems(
    store: Store, manifest: Manifest, shards: list[int], sealed: Mapping[str, ObjectSum], progress: Progress
) -> Iterator[Problem]:
    """Look into shards; `sealed` are the sums that the seal has of their records, if there is one."""
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        key = record_key(shard)
        what = difference(store, key, sealed[key]) if key in sealed else None
        try:
            record = read_shard_record(store, manifest, shard)
        except CacheError as error:
            yield Problem(key, what or str(error), _again(shard))
            continue
        found = list(_shard_problems(store, manifest, record, shard))
        if what and (found or store.read(key) != to_bytes(record)):
            yield Problem(key, what, _again(shard))
        elif what:
            yield Problem(SEAL_KEY, f"it has another sum of {key}, which is whole", _RESEAL)
        yield from found
    progress(len(shards), len(shards))


def _shard_problems(store: Store, manifest: Manifest, record: CommitRecord, shard: int) -> Iterator[Problem]:
    damaged = {
        key: what
        for key, sums in record.objects.items()
        if (what := difference(store, key, sums) or _exchange(store, manifest, record, key))
    }
    try:
        table = None if sequences_key(shard) in damaged else read_table(store, record)
        for key, what in damaged.items():
            yield Problem(key, what + _damaged_chunks(store, manifest, record, key, table), _again(shard))
        if table is None or damaged:
            return
        found = list(_table_problems(store, manifest, table, record))
        yield from found or _content_problems(store, manifest, table, record)
    except CacheError as error:  # right checksums over what cannot be read
        yield Problem(f"shard {shard}", str(error), _again(shard))


def _exchange(store: Store, manifest: Manifest, record: CommitRecord, key: str) -> str | None:
    """Return how the chunks of a whole object differ from those that were written."""
    name = key.partition("/")[0]
    if name not in manifest.arrays:
        return None
    try:
        found = open_shard(store, manifest, record.objects, name, record.shard).read_sums()
    except CacheError as error:
        return str(error)
    return None if found == record.objects[key].chunks else "its chunks are whole, but others than were written here"


def _damaged_chunks(store: Store, manifest: Manifest, record: CommitRecord, key: str, table: pa.Table | None) -> str:
    """Return which chunks of a damaged object are, and whose; nothing where that cannot be told."""
    spec = manifest.arrays.get(key.partition("/")[0])
    if spec is None or store.size(key) is None:
        return ""
    file, chunks = open_shard(store, manifest, record.objects, spec.name, record.shard), []
    try:
        file.read_sums()
    except CacheError:
        return "; its chunk index is lost"
    for chunk in range(spec.chunks_per_shard):
        try:
            file.read_chunk(chunk)
        except CacheError:
            chunks.append(chunk)
    if table is None or not chunks:
        return f"; damaged are the chunks {chunks}" if chunks else ""
    ends = table[f"{spec.axis}_start"].to_numpy() + table[f"num_{spec.axis}s"].to_numpy()
    first = record.shard * manifest.settings.shard_tokens + np.array(chunks) * spec.chunk_rows
    touched = (
        (table[f"{spec.axis}_start"].to_numpy() < first[:, None] + spec.chunk_rows) & (ends > first[:, None])
    ).any(0)
    names = table["id"].filter(pa.array(touched)).to_pylist()
    shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"; damaged are the chunks {chunks}, of the sequences {shown or 'none'}"


def _table_problems(store: Store, manifest: Manifest, table: pa.Table, record: CommitRecord) -> Iterator[Problem]:
    """Sequences must lie end to end from the beginning of the shard, and be as many as the record says."""
    shard, where = record.shard, sequences_key(record.shard)
    try:
        require_places(str(store), table, manifest, shard)
    except CacheError as error:
        yield Problem(where, str(error), _again(shard))
        return
    for axis in ("token", "target"):
        counts = table[f"num_{axis}s"].to_numpy().astype(np.int64)
        starts = shard * manifest.settings.shard_tokens + np.cumsum(counts) - counts
        if (table[f"{axis}_start"].to_numpy() != starts).any():
            yield Problem(where, f"its sequences overlap or leave gaps on the {axis} axis", _again(shard))
    found = (len(table), int(table["num_tokens"].to_numpy().sum()), int(table["num_targets"].to_numpy().sum()))
    expected = (record.num_sequences, record.num_tokens, record.num_targets)
    if found != expected:
        what = f"it has {found} sequences, tokens and targets, the record {expected}"
        yield Problem(where, what, _again(shard))
    if hash_bytes(table["content_key"].to_pylist()) != record.content:
        yield Problem(where, "its content keys are not those of the commit record", _again(shard))


def _content_problems(store: Store, manifest: Manifest, table: pa.Table, record: CommitRecord) -> Iterator[Problem]:
    """Look at what a shard holds: its tokens at once, its targets a chunk at a time."""
    shard = record.shard
    files = {name: open_shard(store, manifest, record.objects, name, shard) for name in manifest.arrays}
    token_ids, mask = (
        files.pop(name).read_rows(0, manifest.settings.shard_tokens) for name in ("token_ids", "target_mask")
    )
    broken = list(_token_problems(manifest, table, shard, token_ids, mask))
    yield from broken
    if not broken:
        yield from _target_problems(manifest, table, shard, files, token_ids[np.flatnonzero(mask) + 1])


def _target_problems(
    manifest: Manifest, table: pa.Table, shard: int, files: dict[str, ShardFile], labels: npt.NDArray[np.uint32]
) -> Iterator[Problem]:
    settings = manifest.settings
    owner = np.repeat(np.arange(len(table)), table["num_targets"].to_numpy())
    sums, found = np.zeros((4, len(table))), dict[str, list[int]]()
    for chunk in range(settings.shard_tokens // CHUNK_TARGETS):
        span = slice(chunk * CHUNK_TARGETS, (chunk + 1) * CHUNK_TARGETS)
        owners = owner[span]
        stored = {name: file.read_chunk(chunk) for name, file in files.items()}
        for name, values in stored.items():
            if values[len(owners) :].any():
                what = f"rows of chunk {chunk} that no sequence owns are not 0"
                yield Problem(manifest.arrays[name].object_key(shard), what, _again(shard))
        used = {name: values[: len(owners)] for name, values in stored.items()}
        rows = decode_rows(used, settings.encoding, settings.temperatures, settings.tail_temperature)
        for what, wrong in faults(rows, labels[span], settings.encoding, manifest.vocab_size).items():
            if wrong.any():
                found.setdefault(what, []).extend(owners[wrong].tolist())
        label = bounds(rows, settings.encoding)["label_logprob"]
        numbers: list[npt.NDArray[Any]] = [*label, *mass_bounds(rows, settings.encoding)]
        for index, weights in enumerate(numbers):
            sums[index] += np.bincount(owners, weights=weights, minlength=len(table))
    for what, sequences in found.items():
        others = f", and {len(sequences) - 1} more targets of shard {shard}" if len(sequences) > 1 else ""
        yield Problem(_name(table, sequences[0]), f"{what}: a target of it{others}", _again(shard))
    yield from _mean_problems(table, shard, sums)


def _token_problems(
    manifest: Manifest, table: pa.Table, shard: int, token_ids: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8]
) -> Iterator[Problem]:
    num_tokens = table["num_tokens"].to_numpy()
    stops = np.cumsum(num_tokens)
    used = int(num_tokens.sum())
    for name, values in (("token_ids", token_ids), ("target_mask", mask)):
        if values[used:].any():
            what = "rows that no sequence owns are not 0"
            yield Problem(manifest.arrays[name].object_key(shard), what, _again(shard))
    rows = zip(
        stops - num_tokens, stops, table["content_key"].to_pylist(), table["num_targets"].to_pylist(), strict=True
    )
    for index, (start, stop, key, num_targets) in enumerate(rows):
        for what in _sequence_problems(token_ids[start:stop], mask[start:stop], key, num_targets, manifest.vocab_size):
            yield Problem(_name(table, index), what, _again(shard))


def _sequence_problems(
    token_ids: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8], key: bytes, num_targets: int, vocab_size: int
) -> Iterator[str]:
    if (token_ids >= vocab_size).any():
        yield f"it has token ids beyond the vocabulary of {vocab_size}"
    if (mask > 1).any() or mask[-1:].any():
        yield "its mask has other values than 0 and 1, or supervises the last position, which no token follows"
    if content_key(token_ids, mask.astype(np.bool_)) != key:
        yield "its tokens and mask do not give its content key"
    if np.count_nonzero(mask) != num_targets:
        yield f"its mask supervises {np.count_nonzero(mask)} positions, the table has {num_targets} targets"


def _mean_problems(table: pa.Table, shard: int, sums: npt.NDArray[np.float64]) -> Iterator[Problem]:
    """Compare the means of the table with those of the rows."""
    num_targets = table["num_targets"].to_numpy()
    least_label, most_label, least, most = sums / num_targets
    nll, mass = (table[name].to_numpy().astype(np.float64) for name in ("teacher_nll", "topk_mass"))
    nearest = nll.clip(-most_label, -least_label)
    differs = {
        "teacher NLL": ~np.isclose(nll, nearest, rtol=SLACK, atol=SLACK),
        "mean top-k mass": ~((least - SLACK <= mass) & (mass <= most + SLACK)),
    }
    for name, wrong in differs.items():
        for index in np.flatnonzero(wrong & (num_targets > 0)):
            rows = f"NLL {-most_label[index]:.5f}, mass {most[index]:.5f}"
            what = f"its {name} in the table is not that of its rows ({rows})"
            yield Problem(_name(table, int(index)), what, _again(shard))


def _name(table: pa.Table, index: int) -> str:
    return f"sequence {table['id'][index].as_py()!r}"


def object_keys(manifest: Manifest, shard: int) -> set[str]:
    """Return the objects of a shard, its commit record apart."""
    return {sequences_key(shard), *(spec.object_key(shard) for spec in manifest.arrays.values())}


def difference(store: Store, key: str, expected: ObjectSum) -> str | None:
    """Return how an object differs from what was written."""
    found = _difference_here(store, key, expected)
    return _difference_here(store, key, expected) if found and store.discard_copy(key) else found


def _difference_here(store: Store, key: str, expected: ObjectSum) -> str | None:
    """Return how an object, or the local copy of it, differs from what was written, reading it in blocks."""
    try:
        path = store.local(key)
        num_bytes, crc = path.stat().st_size, 0
        if num_bytes != expected.num_bytes or not path.is_file():  # a pipe or a device may have no end
            return f"it has {num_bytes} bytes, expected {expected.num_bytes}"
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc = google_crc32c.extend(crc, block)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except CacheError as error:
        return f"it cannot be read: {error}"
    if crc == expected.crc32c:
        return None
    return f"it has {num_bytes} bytes with crc32c {crc:08x}, expected {expected.crc32c:08x}"


def _again(shard: int) -> Remedy:
    text = f"`todi-cache repair`, then the same capture again: it redoes shard {shard} alone"
    return Remedy(text, (SEAL_KEY, record_key(shard)), shard)


def _rewrite(key: str) -> Remedy:
    return Remedy("`todi-cache repair`, then the same capture again: it writes it anew", (SEAL_KEY, key))
