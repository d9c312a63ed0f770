"""`todi-cache inspect`: a cache in, what it holds and what that costs out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from todi_offline.cache.commit import read_object
from todi_offline.cache.layout import TOKENIZER_KEY
from todi_offline.cache.reader import Cache, CachedSequence, open_cache
from todi_offline.config import to_dict
from todi_offline.errors import CacheError

_SAMPLED_SEQUENCES = 64
_SHOWN_IDS = 5


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--rows", default=0, metavar="N", help="Show the targets of N positions, spread over the cache.")
@click.option("--text", is_flag=True, help="Show ids as text, too.")
@click.option("--allow-unsealed", is_flag=True, help="Look at the committed part of an unfinished cache.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(cache: Path, rows: int, text: bool, allow_unsealed: bool, as_json: bool) -> None:
    """Show the manifest, the arrays, the bytes a target by array, and the mass that the first k entries cover.

    Example: todi-cache inspect cache/ --rows 5 --text
    """
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    found = summarise(opened) | {"rows": list(sample_rows(opened, rows, with_text=text))}
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo("\n".join(_lines(found)))


def summarise(cache: Cache) -> dict[str, Any]:
    """Return what `inspect` shows, as JSON knows it."""
    manifest, num_targets = cache.manifest, int(cache.num_targets.sum())
    num_bytes = cache.bytes_by_array
    nll = np.average(cache.sequences["teacher_nll"].to_numpy(), weights=cache.num_targets)
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
                "columns": spec.columns,
                "chunk_rows": spec.chunk_rows,
                "bytes_per_target": num_bytes[name] / num_targets,
            }
            for name, spec in manifest.arrays.items()
        },
        "manifest": manifest.to_json() | {"settings": to_dict(manifest.settings)},
    }


def coverage(cache: Cache) -> dict[int, float]:
    """Return the mean teacher mass of the first k entries, for k = 1, 2, 4, ..., over sequences spread evenly."""
    chosen = np.unique(np.linspace(0, len(cache) - 1, _SAMPLED_SEQUENCES).round().astype(int))
    mass = np.concatenate([np.exp(cache[index].targets.logprobs).cumsum(axis=1) for index in chosen]).mean(axis=0)
    widths = {2**power for power in range(len(mass).bit_length()) if 2**power < len(mass)} | {len(mass)}
    return {k: float(mass[k - 1]) for k in sorted(widths)}


def sample_rows(cache: Cache, count: int, *, with_text: bool) -> Iterator[dict[str, Any]]:
    """Yield the targets of `count` positions, one from the middle of each of as many sequences, spread evenly."""
    decode = _decoder(cache) if with_text and count else lambda _: None
    for index in np.unique(np.linspace(0, len(cache) - 1, count).round().astype(int)).tolist():
        sequence = cache[index]
        yield {"sequence": cache.sequences["id"][index].as_py(), **_row(sequence, decode)}


def _row(sequence: CachedSequence, decode: Any) -> dict[str, Any]:
    rows = sequence.targets
    target = len(rows) // 2
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

    if not (cache.root / TOKENIZER_KEY).exists():
        raise CacheError(f"{cache.root} holds no {TOKENIZER_KEY}: its tokenizer had no such form; leave out --text")
    tokenizer = Tokenizer.from_str(read_object(cache.root, TOKENIZER_KEY).decode())
    return lambda number: tokenizer.decode([number], skip_special_tokens=False)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    manifest, settings = found["manifest"], found["manifest"]["settings"]
    teacher, data = manifest["teacher"], manifest["data"]
    size = f"{teacher.get('num_parameters', 0):,} parameters"
    yield f"teacher      {teacher.get('model_type')}, {size}, {teacher.get('dtype')}"
    yield "data         " + ", ".join(f"{name} {data[name]}" for name in ("source", "split", "form") if data.get(name))
    yield f"vocabulary   {manifest['vocab_size']:,}"
    yield f"kept         k = {settings['k']}, {settings['tail_samples']} tail samples, T = {settings['temperatures']}"
    yield f"stored as    {settings['encoding']}, {settings['codec']}; format {manifest['format_version']}"
    yield f"holds        {found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['targets']:,} targets"
    yield f"size         {found['bytes']:,} bytes, {found['bytes_per_target']:.1f} a target"
    yield f"teacher NLL  {found['teacher_nll']:.4f} nats"
    yield ""
    yield f"{'array':16}{'dtype':>10}{'columns':>10}{'bytes a target':>17}"
    for name, array in found["arrays"].items():
        yield f"{name:16}{array['dtype']:>10}{array['columns'] or 1:>10}{array['bytes_per_target']:>17.2f}"
    yield ""
    yield "mass of the first k   " + "   ".join(f"{k}: {mass:.3f}" for k, mass in found["coverage"].items())
    for row in found["rows"]:
        yield ""
        tails = ", ".join(f"{value:.3f} at T = {t}" for t, value in row["tail_logsumexp"].items())
        yield f"{row['sequence']}, position {row['position']}: kept mass {row['kept_mass']:.4f}; log tail {tails}"
        yield f"    label {_shown(row['label'])}"
        yield "    top   " + "  ".join(map(_shown, row["top"]))


def _shown(entry: dict[str, Any]) -> str:
    text = f" {entry['text']!r}" if "text" in entry else ""
    return f"{entry['id']}{text} {entry['p']:.4f}"
