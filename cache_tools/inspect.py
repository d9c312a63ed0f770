"""`todi-cache inspect`: a cache in, what it holds and what that costs out."""

import json
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from todi_offline.cache.format.layout import TOKENIZER_KEY
from todi_offline.cache.format.records import read_object
from todi_offline.cache.format.shard import codec_name
from todi_offline.cache.reader import Cache, CachedSequence, open_cache
from todi_offline.errors import CacheError, first_line

_SAMPLED_SEQUENCES = 64
_SAMPLED_TARGETS = 64  # of each
_SHOWN_IDS = 5


@click.command()
@click.argument("cache")
@click.option("--rows", type=click.IntRange(0), default=0, metavar="N", help="Show N targets, always the same ones.")
@click.option("--text", is_flag=True, help="Show ids as text, too.")
@click.option("--allow-unsealed", is_flag=True, help="Look at the committed part of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(cache: str, rows: int, text: bool, allow_unsealed: bool, as_json: bool) -> None:
    """Show the manifest, the arrays, the bytes a target by array, and the mass that the first k entries cover.

    Example: todi-cache inspect cache/ --rows 5 --text
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    found = summarise(opened) | {"rows": list(sample_rows(opened, rows, with_text=text))}
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(_lines(found))


def summarise(cache: Cache) -> dict[str, Any]:
    """Return what `inspect` shows, as JSON knows it."""
    manifest, num_targets = cache.manifest, int(cache.num_targets.sum())
    num_bytes = cache.bytes_by_array
    nll = np.average(cache.columns["teacher_nll"], weights=cache.num_targets)
    return {
        "sequences": len(cache),
        "tokens": int(cache.num_tokens.sum()),
        "targets": num_targets,
        "bytes": sum(num_bytes.values()),
        "bytes_per_target": sum(num_bytes.values()) / num_targets,
        "teacher_nll": float(nll),
        "coverage": coverage(cache),
        "arrays": {
            name: {
                "dtype": spec.dtype.name,
                "shape": json.loads(read_object(cache.store, f"{name}/zarr.json"))["shape"],
                "shard": spec.shape(spec.shard_rows),
                "chunk": spec.shape(spec.chunk_rows),
                "codec": codec_name(spec.dtype, manifest.settings.codec),
                "bytes_per_target": num_bytes[name] / num_targets,
            }
            for name, spec in manifest.arrays.items()
        },
        "manifest": manifest.to_json(),
    }


def coverage(cache: Cache) -> dict[int, float]:
    """Return the mean teacher mass of the first k entries, for k = 1, 2, 4, ..., over some targets spread evenly."""
    parts = []
    for index in _spread(len(cache), _SAMPLED_SEQUENCES):
        logprobs = cache[index].targets.logprobs
        parts.append(np.exp(logprobs[_spread(len(logprobs), _SAMPLED_TARGETS)], dtype=np.float64).cumsum(axis=1))
    mass = np.concatenate(parts).mean(axis=0)
    widths = {2**power for power in range(len(mass).bit_length()) if 2**power < len(mass)} | {len(mass)}
    return {k: float(mass[k - 1]) for k in sorted(widths)}


def sample_rows(cache: Cache, count: int, *, with_text: bool) -> Iterator[dict[str, Any]]:
    """Yield `count` targets, drawn at random from all of them but the same ones each time, in their order."""
    decode = _decoder(cache) if with_text and count else lambda _: None
    ends = np.cumsum(cache.num_targets, dtype=np.int64)
    total = int(ends[-1])
    for number in sorted(np.random.default_rng(0).choice(total, min(count, total), replace=False).tolist()):
        index = int(np.searchsorted(ends, number, side="right"))
        target = number - int(ends[index] - cache.num_targets[index])
        yield {"sequence": cache.sequences["id"][index].as_py(), **_row(cache[index], target, decode)}


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` of the first `total` numbers, spread evenly."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist() if total else []


def _row(sequence: CachedSequence, target: int, decode: Any) -> dict[str, Any]:
    rows = sequence.targets
    position = int(np.flatnonzero(sequence.target_mask)[target])

    def entry(number: Any, logprob: Any) -> dict[str, Any]:
        named = {"id": int(number), "p": float(np.exp(logprob))}
        return named | ({} if decode(int(number)) is None else {"text": decode(int(number))})

    shown = zip(rows.ids[target, :_SHOWN_IDS], rows.logprobs[target, :_SHOWN_IDS], strict=True)
    tails = zip(rows.temperatures, rows.tail_logsumexp[target], strict=True)
    return {
        "position": position,
        "label": entry(sequence.token_ids[position + 1], rows.label_logprob[target]),
        "top": [entry(number, logprob) for number, logprob in shown],
        "kept_mass": float(np.exp(rows.logprobs[target]).sum()),
        "tail_logsumexp": {f"{temperature:g}": float(value) for temperature, value in tails},
    }


def _decoder(cache: Cache) -> Any:
    from tokenizers import Tokenizer

    if cache.store.size(TOKENIZER_KEY) is None:
        raise CacheError(f"{cache.root} holds no {TOKENIZER_KEY}: its tokenizer had no such form; leave out --text")
    try:
        tokenizer = Tokenizer.from_str(read_object(cache.store, TOKENIZER_KEY).decode())
    except Exception as error:  # what the package raises has no narrower class
        raise CacheError(
            f"{cache.root}/{TOKENIZER_KEY} is no tokenizer: {first_line(error)}; leave out --text"
        ) from error
    return lambda number: tokenizer.decode([number], skip_special_tokens=False)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    manifest, settings = found["manifest"], found["manifest"]["settings"]
    teacher = manifest["teacher"]
    size = f"{teacher['num_parameters']:,} parameters" if "num_parameters" in teacher else None
    known = (teacher.get("model_type"), teacher.get("name"), size, teacher.get("dtype"))
    yield "teacher      " + ", ".join(str(fact) for fact in known if fact is not None)
    for part in manifest["parts"]:
        recipe = ", ".join(f"{name} {value}" for name, value in part["recipe"].items() if value is not None)
        yield f"data         {part['num_sequences']:,} sequences: {recipe}"
    yield f"vocabulary   {manifest['vocab_size']:,}"
    yield f"kept         k = {settings['k']}, {settings['tail_samples']} tail samples, T = {settings['temperatures']}"
    yield f"stored as    {settings['encoding']}, {settings['codec']}; format {manifest['format_version']}"
    yield f"holds        {found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['targets']:,} targets"
    yield f"size         {found['bytes']:,} bytes, {found['bytes_per_target']:.1f} a target"
    yield f"teacher NLL  {found['teacher_nll']:.4f} nats"
    yield ""
    yield f"{'array':16}{'dtype':>8}{'shape':>16}{'chunk':>12}  {'codec':12}{'bytes a target':>15}"
    for name, array in found["arrays"].items():
        shape, chunk = (" x ".join(map(str, array[size])) for size in ("shape", "chunk"))
        described = f"{name:16}{array['dtype']:>8}{shape:>16}{chunk:>12}  {array['codec']:12}"
        yield f"{described}{array['bytes_per_target']:>15.2f}"
    yield ""
    yield "mass of the first k   " + "   ".join(f"{k}: {mass:.3f}" for k, mass in found["coverage"].items())
    for row in found["rows"]:
        yield ""
        tails = ", ".join(f"{value:.3f} at T = {t}" for t, value in row["tail_logsumexp"].items())
        yield f"{row['sequence']}, position {row['position']}: kept mass {row['kept_mass']:.4f}; log tail {tails}"
        yield f"    label {_shown(row['label'])}"
        yield "    top   " + "  ".join(map(_shown, row["top"]))


def _print(lines: Iterator[str]) -> None:
    """Print lines, coloured on a terminal."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, markup=False, emoji=False, soft_wrap=True)


def _shown(entry: dict[str, Any]) -> str:
    text = f" {entry['text']!r}" if "text" in entry else ""
    return f"{entry['id']}{text} {entry['p']:.4f}"
