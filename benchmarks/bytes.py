"""How many bytes does a target take, by encoding, codec and K, and how much of the teacher do they lose?

Real targets are stored in every encoding with every codec, and in the layouts of other systems. These layouts are
rebuilt from the documentation of each system, with the same number of targets in a block:

    npz, f16        numpy.savez_compressed (deflate) of u16 ids and f16 log-probs
    Megatron        u16 ids, a bool for the 17th bit of each, f16 log-probs, zstd at its default level: the layout of
                    megatron/training/distillation of github.com/NVIDIA/Megatron-LM
    parquet         lists of int32 ids and float32 log-probs, zstd
    DistillKit      some log-probs in bfloat16, a polynomial for the others, ids in as many bits as they need, no codec:
                    the recommended and the budget settings of its README (`_distillkit.py`), at the k of this table

These layouts have no sums of the tail, no log-prob of the label and no samples. All bytes that belong to a target are
counted; ours include checksums and index, in full shards. Tokens, masks and sequence tables are counted apart.

Nats lost at T: the mean over targets of the KL of the targets that are read back from those that were stored. It runs
over the k kept entries and one entry for all others, each at T and divided by its own sum. A layout without a tail gets
1 - sum at T = 1, and no value at T = 2. The loss of the tail samples is not counted. `bf16_logit` gets the nearest
logits that bfloat16 has.

The teacher is SmolLM2-135M-Instruct in float32 and reads Python's own documentation; `--set teacher=FOLDER` and
`--set data=FILE` take others, `--set cache=FOLDER` the targets of a cache, whose own rounding is not counted.

Not claimed: anything about another teacher, which may be surer or less sure. One process is timed.
"""

import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._distillkit import BUDGET, RECOMMENDED
from todi_offline.cache.format.encoding import decode_rows, encode_rows
from todi_offline.cache.format.keys import content_key
from todi_offline.cache.format.layout import CHUNK_TARGETS, CODECS, ENCODINGS, CacheSettings, array_specs
from todi_offline.cache.format.narrow import narrow
from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import SequenceRows, sequence_table
from todi_offline.cache.format.shard import encode_shard
from todi_offline.cache.reader import open_cache
from todi_offline.cache.shard_file import ShardFile
from todi_offline.capturing.engines import TransformersEngine
from todi_offline.commands.demo import fetch_teacher
from todi_offline.data import DataConfig, load_examples
from todi_offline.teacher.in_transformers import TeacherConfig, load_teacher, teacher_fingerprint

KEPT = CacheSettings(k=64, tail_samples=8)
SHAPES = [(64, 0), (32, 8), (16, 8), (16, 0), (8, 4)]
"""k and tail samples that are stored."""
BARS = {(64, 0): (115.0, 2e-4), (16, 8): (54.0, 2e-4), (8, 4): (29.0, 2e-4)}
"""Limits of the encoding with the fewest bytes: bytes a target, and nats lost at T = 1."""
FACTS = ("model_type", "num_parameters", "dtype")
COLUMNS = {
    "ids": ("topk_ids",),
    "values": ("topk_logprobs", "log_partition"),
    "tail": ("tail_logsumexp",),
    "label": ("label_logprob",),
    "samples": ("tail_ids", "tail_logprobs"),
}

Numbers = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Targets before and after one way to store them."""

    num_bytes: dict[str, int]
    """Bytes by array."""
    given: TargetRows
    back: TargetRows
    """The targets as they are read back."""
    targets_per_second: float | None = None
    """Targets read a second."""


def run(
    quick: bool, cache: str | None = None, teacher: str | None = None, data: str = "stdlib", limit: str = "160"
) -> dict[str, object]:
    sequences, vocab_size, source = (
        _from_cache(cache) if cache else _captured(teacher or str(fetch_teacher()), data, 6 if quick else int(limit))
    )
    source |= _counts(sequences, vocab_size)
    print("\n".join(f"{name}: {value}" for name, value in source.items()))
    rows: list[dict[str, Any]] = []
    for k, samples in SHAPES[2:] if quick else SHAPES:
        settings = dataclasses.replace(KEPT, k=k, tail_samples=samples)
        targets = TargetRows.concatenate(
            [narrow(each.targets, settings, content_key(each.token_ids, each.target_mask)) for each in sequences]
        )
        targets = targets[: len(targets) // CHUNK_TARGETS * CHUNK_TARGETS]
        print(f"\nK = {k}, {samples} samples; {len(targets):,} targets in full chunks")
        print(
            f"{'':24}" + "".join(f"{name:>9}" for name in (*COLUMNS, "all")) + "   lost at T=1      at T=2   targets/s"
        )
        for name, stored in _each(targets, settings, vocab_size):
            rows.append({"k": k, "samples": samples, "stored as": name, **_measured(stored)})
            _print(rows[-1])
        if (k, samples) in BARS and not quick:  # the bars are for more targets
            _print_bar([row for row in rows if (row["k"], row["samples"]) == (k, samples)], *BARS[k, samples])
    return {"source": source, "rows": rows}


def _from_cache(folder: str) -> tuple[list[SequenceRows], int, dict[str, Any]]:
    opened = open_cache(folder)
    sequences = [SequenceRows("", "", each.token_ids, each.target_mask, each.targets) for each in opened]
    teacher = opened.manifest.teacher
    source = {"encoding": opened.manifest.settings.encoding, "teacher": {n: teacher.get(n) for n in FACTS}}
    return sequences, opened.manifest.vocab_size, source


def _captured(folder: str, data: str, limit: int) -> tuple[list[SequenceRows], int, dict[str, Any]]:
    teacher = load_teacher(TeacherConfig(teacher=folder, dtype="float32"))
    examples = load_examples(DataConfig(data=data, limit=limit), teacher.tokenizer)
    facts = teacher_fingerprint(teacher)
    source = {"data": Path(data).name, "teacher": {name: facts[name] for name in FACTS}}
    targets = TransformersEngine(teacher, 4096).targets(list(examples), KEPT, lambda _: None)
    sequences = [
        SequenceRows(example.id, example.source, example.token_ids, example.target_mask, rows)
        for example, rows in zip(examples, targets, strict=True)
    ]
    return sequences, teacher.vocab_size, source


def _counts(sequences: list[SequenceRows], vocab_size: int) -> dict[str, Any]:
    """Return the numbers of sequences, tokens and targets, and the bytes a target of the parts counted apart."""
    num_targets = sum(len(each.targets) for each in sequences)
    tokens = np.concatenate([each.token_ids for each in sequences])
    mask = np.concatenate([each.target_mask for each in sequences])
    encoded = [encode_rows(each.targets, KEPT.encoding) for each in sequences]
    num_bytes = {"sequences": sequence_table(0, sequences, encoded, KEPT).nbytes}
    for name, values in (("token_ids", tokens), ("target_mask", mask)):
        spec = array_specs(KEPT, vocab_size)[name]
        shard_rows = -(-len(values) // spec.chunk_rows) * spec.chunk_rows
        num_bytes[name] = len(encode_shard(dataclasses.replace(spec, shard_rows=shard_rows), values, KEPT.codec))
    return {
        "sequences": len(sequences),
        "tokens": len(tokens),
        "targets": num_targets,
        "bytes a target counted apart": {name: round(value / num_targets, 2) for name, value in num_bytes.items()},
    }


def _each(targets: TargetRows, settings: CacheSettings, vocab_size: int) -> Iterator[tuple[str, Stored]]:
    for encoding in ENCODINGS:
        given = _in_bf16(targets) if encoding == "bf16_logit" else targets
        for codec in CODECS:
            chosen = dataclasses.replace(settings, encoding=encoding, codec=codec)  # type: ignore[arg-type]
            yield f"{encoding}, {codec}", _ours(given, chosen, vocab_size)
    others: dict[str, Callable[[TargetRows], tuple[dict[str, int], npt.NDArray[Any]]]] = {
        "npz, f16": _npz,
        "Megatron": _megatron,
        "parquet": _parquet,
    }
    for name, store in others.items():
        num_bytes, logprobs = store(targets)
        yield name, Stored(num_bytes, targets, _without_tail(targets, logprobs))
    for name, layout in (("DistillKit, recommended", RECOMMENDED), ("DistillKit, budget", BUDGET)):
        if layout.fits(settings.k):
            num_bytes = {part: value * len(targets) for part, value in layout.num_bytes(settings.k, vocab_size).items()}
            yield name, Stored(num_bytes, targets, _without_tail(targets, layout.read_back(targets.logprobs)))


def _ours(targets: TargetRows, settings: CacheSettings, vocab_size: int) -> Stored:
    arrays = encode_rows(targets, settings.encoding)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, values in arrays.items():
            spec = dataclasses.replace(array_specs(settings, vocab_size)[name], shard_rows=len(targets))
            files[name] = ShardFile(Path(folder) / name, spec, settings.codec)
            files[name].path.write_bytes(encode_shard(spec, values, settings.codec))
        num_bytes = {name: file.path.stat().st_size for name, file in files.items()}
        read: list[TargetRows] = []
        seconds = []
        for chunk in range(len(targets) // CHUNK_TARGETS):
            started = time.perf_counter()
            stored = {name: file.read_chunk(chunk) for name, file in files.items()}
            read.append(decode_rows(stored, settings.encoding, settings.temperatures, settings.tail_temperature))
            seconds.append(time.perf_counter() - started)
    return Stored(num_bytes, targets, TargetRows.concatenate(read), CHUNK_TARGETS / statistics.median(seconds))


def _in_bf16(targets: TargetRows) -> TargetRows:
    """Return targets whose logits are rounded to bfloat16, with an invented log-partition."""
    log_partition = np.full(len(targets), 20, np.float32)
    bits = (targets.logprobs + log_partition[:, None]).view(np.uint32)
    logits = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return dataclasses.replace(targets, logprobs=logits - log_partition[:, None], log_partition=log_partition)


def _chunks(targets: TargetRows) -> Iterator[TargetRows]:
    return (targets[start : start + CHUNK_TARGETS] for start in range(0, len(targets), CHUNK_TARGETS))


def _npz(targets: TargetRows) -> tuple[dict[str, int], npt.NDArray[Any]]:
    num_bytes = dict.fromkeys(("topk_ids", "topk_logprobs"), 0)
    for chunk in _chunks(targets):
        for name, values in (("topk_ids", chunk.ids.astype("u2")), ("topk_logprobs", chunk.logprobs.astype("f2"))):
            buffer = io.BytesIO()
            np.savez_compressed(buffer, values)
            num_bytes[name] += len(buffer.getvalue())
    return num_bytes, targets.logprobs.astype("f2")


def _megatron(targets: TargetRows) -> tuple[dict[str, int], npt.NDArray[Any]]:
    codec = numcodecs.Zstd()
    num_bytes = dict.fromkeys(("topk_ids", "topk_logprobs"), 0)
    for chunk in _chunks(targets):
        ids = (chunk.ids & 0xFFFF).astype("u2"), (chunk.ids >> 16).astype(np.bool_)
        num_bytes["topk_ids"] += sum(len(codec.encode(each)) for each in ids)
        num_bytes["topk_logprobs"] += len(codec.encode(chunk.logprobs.astype("f2")))
    return num_bytes, targets.logprobs.astype("f2")


def _parquet(targets: TargetRows) -> tuple[dict[str, int], npt.NDArray[Any]]:
    columns = {"topk_ids": targets.ids.astype(np.int32), "topk_logprobs": targets.logprobs}
    table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", row_group_size=CHUNK_TARGETS)
    metadata = pq.read_metadata(pa.BufferReader(buffer.getvalue()))
    num_bytes = dict.fromkeys(columns, 0)
    for group in range(metadata.num_row_groups):
        for index, name in enumerate(columns):
            num_bytes[name] += metadata.row_group(group).column(index).total_compressed_size
    return num_bytes, targets.logprobs


def _without_tail(targets: TargetRows, logprobs: npt.NDArray[Any]) -> TargetRows:
    """Return targets of the kept entries alone: at T = 1 the tail has the mass that they leave."""
    rest = 1 - np.exp(logprobs.astype(np.float32)).sum(axis=1, keepdims=True)
    tail = np.log(np.maximum(rest, 1e-9)).astype(np.float32)
    return dataclasses.replace(targets, logprobs=logprobs.astype(np.float32), tail_logsumexp=tail, temperatures=(1.0,))


def _measured(stored: Stored) -> dict[str, Any]:
    total = len(stored.given)
    each = {column: sum(stored.num_bytes.get(name, 0) for name in names) for column, names in COLUMNS.items()}
    assert sum(each.values()) == sum(stored.num_bytes.values()), "every array has its column"
    rate = stored.targets_per_second
    return {
        "bytes": {name: round(value / total, 2) for name, value in [*each.items(), ("all", sum(each.values()))]},
        "nats lost": {f"{t:g}": _lost(stored.given, stored.back, t) for t in stored.back.temperatures},
        "targets per second": rate and round(rate),
    }


def _lost(given: TargetRows, back: TargetRows, temperature: float) -> float:
    """Return the mean KL of the entries read back from the entries that were stored."""
    p, q = _entries(given, temperature), _entries(back, temperature)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(p), 0, np.exp(p) * (p - q))
    return float(f"{terms.sum(axis=1).mean():.3g}")


def _entries(rows: TargetRows, temperature: float) -> Numbers:
    """Return the log-probs of the kept entries, by rising id, and of all others."""
    by_id = np.take_along_axis(rows.logprobs, np.argsort(rows.ids, axis=1), axis=1) / np.float64(temperature)
    entries = np.column_stack([by_id, rows.tail_logsumexp[:, rows.temperatures.index(temperature)]])
    return np.asarray(entries - np.logaddexp.reduce(entries, axis=1, keepdims=True))


def _print(row: dict[str, Any]) -> None:
    lost = "".join(f"{row['nats lost'].get(t, '-'):>12}" for t in ("1", "2"))
    rate = f"{row['targets per second']:12,}" if row["targets per second"] else f"{'':12}"
    print(f"{row['stored as']:24}" + "".join(f"{value:9.2f}" for value in row["bytes"].values()) + f"    {lost}{rate}")


def _print_bar(rows: Sequence[dict[str, Any]], most_bytes: float, most_lost: float) -> None:
    best = min((row for row in rows if row["targets per second"]), key=lambda row: row["bytes"]["all"])
    met = best["bytes"]["all"] <= most_bytes and best["nats lost"]["1"] <= most_lost
    print(f"{best['stored as']}: at most {most_bytes:g} bytes and {most_lost:g} nats: {'met' if met else 'MISSED'}")
