"""Small caches of a fake teacher: softmaxes over a small vocabulary, in the smallest shards."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.names import ROOT_KEY, record_key, sequences_key
from todi_offline.cache.format.records import CommitRecord, ObjectSum
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows, table_bytes
from todi_offline.cache.format.shard import chunk_sums, encode_shard
from todi_offline.cache.objects import committed_shards, read_record, read_root, read_table
from todi_offline.cache.shard_file import ShardFile
from todi_offline.cache.store import LocalStore
from todi_offline.cache.writer import CacheWriter, replace_root, write_derived_metadata

VOCAB = 300

FOREIGN = (".git/HEAD", "README.md", "run/model.safetensors", "commits/0.json", "topk_ids/notes.txt", "x.tmp")
"""Files in a cache's folder that belong to other programs."""


def settings(**changes: Any) -> CacheSettings:
    return CacheSettings(**({"k": 6, "tail_samples": 3, "encoding": "f16", "shard_tokens": 4096} | changes))


def manifest(chosen: CacheSettings, num_shards: int = 1, num_sequences: int = 1, vocab_size: int = VOCAB) -> Manifest:
    teacher = {"model_type": "fake", "num_parameters": 1, "dtype": "float32"}
    tokenizer = {"vocabulary": "a", "merges": "b"}
    part = Part(
        recipe={"source": "fake", "split": None},
        content="c",
        num_sequences=num_sequences,
        num_shards=num_shards,
        versions={"torch": "0"},
    )
    return Manifest(settings=chosen, vocab_size=vocab_size, teacher=teacher, tokenizer=tokenizer, parts=(part,))


def sequence(number: int, chosen: CacheSettings, vocab_size: int = VOCAB, scale: float = 3) -> SequenceRows:
    """Return a sequence made from its number: tokens, mask, and the targets of a softmax over random logits.

    Half of the labels are likely ones. `scale` is the spread of the logits.
    """
    rng = np.random.default_rng(number)
    length = int(rng.integers(8, 120))
    token_ids = rng.integers(0, vocab_size, length).astype(np.uint32)
    mask = rng.random(length) < 0.7
    mask[0], mask[-1] = True, False
    labels = token_ids[np.flatnonzero(mask) + 1].astype(np.int64)
    logits = rng.normal(0, scale, (len(labels), vocab_size)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += np.float32(3 * scale) * (rng.random(len(labels)) < 0.5)
    if chosen.encoding == "bf16_logit":
        logits = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
    log_partition = np.logaddexp.reduce(logits, axis=1, dtype=np.float64).astype(np.float32)
    logprobs = logits - log_partition[:, None]
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : chosen.k]
    tail = logprobs.copy()
    np.put_along_axis(tail, ids, -np.inf, axis=1)
    gumbel = rng.gumbel(size=(len(labels), chosen.tail_samples, vocab_size))
    drawn = np.argmax(tail[:, None] / chosen.tail_temperature + gumbel, axis=2)
    rows = TargetRows(
        ids=ids.astype(np.uint32),
        logprobs=np.take_along_axis(logprobs, ids, axis=1),
        tail_logsumexp=np.stack(
            [np.logaddexp.reduce(tail / t, axis=1, dtype=np.float64) for t in chosen.temperatures], axis=1
        ).astype(np.float32),
        label_logprob=np.take_along_axis(logprobs, labels[:, None], axis=1)[:, 0],
        temperatures=chosen.temperatures,
        tail_temperature=chosen.tail_temperature,
        tail_ids=drawn.astype(np.uint32) if chosen.tail_samples else None,
        tail_logprobs=np.take_along_axis(logprobs, drawn, axis=1) if chosen.tail_samples else None,
        log_partition=log_partition if chosen.encoding == "bf16_logit" else None,
    )
    return SequenceRows(f"fake:{number}", "fake", token_ids, mask, rows)


def write_cache(root: Path, num_shards: int = 2, per_shard: int = 12, *, seal: bool = True, **changes: Any) -> Path:
    """Write a cache; its sequences are numbered from 0 through the shards."""
    chosen = settings(**changes)
    with CacheWriter(root, manifest(chosen, num_shards, num_shards * per_shard)) as writer:
        for shard in writer.missing_shards():
            numbers = range(shard * per_shard, (shard + 1) * per_shard)
            writer.write_shard(shard, [sequence(number, chosen) for number in numbers])
        if seal:
            writer.seal()
    return root


def forge(root: Path, key: str, data: bytes, chunks: bytes | None = None) -> None:
    """Replace an object and correct every checksum, so that only its contents are wrong.

    `chunks` are the new sums of its chunks; without them the old ones stay.
    """
    store = LocalStore(root)
    replace_file(root / key, data)
    found = read_root(store)
    for shard in committed_shards(store):
        record = CommitRecord.from_bytes(store.read(record_key(shard)), record_key(shard))
        if key in record.objects:
            changed = ObjectSum.of(data, record.objects[key].chunks if chunks is None else chunks)
            record = dataclasses.replace(record, objects={**record.objects, key: changed})
            replace_file(root / record_key(shard), record.to_bytes())
    commits = tuple(
        None if commit is None else ObjectSum.of((root / record_key(shard)).read_bytes())
        for shard, commit in enumerate(found.commits)
    )
    replace_root(store, dataclasses.replace(found, commits=commits))
    write_derived_metadata(store, read_root(store))


def edit_root(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a cache's root in place, and correct its checksum."""
    values = json.loads((root / ROOT_KEY).read_text())
    change(values)
    del values["crc32c"]
    text = json.dumps(values, separators=(",", ":"))
    values["crc32c"] = google_crc32c.value(text.encode())
    replace_file(root / ROOT_KEY, (json.dumps(values, indent=1) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a new file; other caches may be linked to the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def write_foreign(root: Path) -> None:
    """Write files into a cache's folder that belong to other programs, and another cache below it."""
    for key in FOREIGN:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_text("not ours")
    write_cache(root / "nested")


def forge_rows(root: Path, name: str, change: Callable[[npt.NDArray[Any]], None], shard: int = 0) -> None:
    """Change stored rows of an array in place, and forge its object."""
    store = LocalStore(root)
    manifest = read_root(store).manifest
    record = read_record(store, manifest, shard, None)
    spec, codec = manifest.arrays[name], manifest.settings.codec
    num_rows = record.num_tokens if spec.axis == "token" else record.num_targets
    rows = ShardFile(root / spec.object_key(shard), spec, codec).read_rows(0, num_rows).copy()
    change(rows)
    data = encode_shard(spec, rows, codec)
    forge(root, spec.object_key(shard), data, chunk_sums(spec, data))


def forge_table(root: Path, column: str, change: Callable[[list[Any]], None], shard: int = 0) -> None:
    """Change a column of a sequence table in place, and forge its object."""
    store = LocalStore(root)
    table = read_table(store, read_record(store, read_root(store).manifest, shard, None))
    values = table[column].to_pylist()
    change(values)
    kind = table.schema.field(column).type
    table = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
    forge(root, sequences_key(shard), table_bytes(table))
