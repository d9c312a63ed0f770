"""Writes the golden caches of this format version: `python -m support.make_golden` in tests/, once a version.

`data/format-N.zip` has a cache of every encoding with every codec, and one of a vocabulary beyond 16 bits; what each
of their sequences is read as stands in `data/format-N.npz`. Releases to come must read them so.
"""

import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from support.fake_cache import manifest, sequence, settings
from todi_offline.cache.format.layout import CODECS, ENCODINGS, FORMAT_VERSION
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.cache.reader import open_cache
from todi_offline.cache.writer import CacheWriter

DATA = Path(__file__).parents[1] / "data"
NUM_SHARDS, PER_SHARD = 2, 2
CACHES = {
    f"{encoding}-{codec}": {"encoding": encoding, "codec": codec, "vocab_size": 300}
    for encoding in ENCODINGS
    for codec in CODECS
} | {"f16-compact-wide": {"encoding": "f16", "codec": "compact", "vocab_size": 70_000}}


def write_golden(root: Path, vocab_size: int, **kept: Any) -> Path:
    """Write one of the caches."""
    chosen = settings(**kept)
    with CacheWriter(root, manifest(chosen, NUM_SHARDS, NUM_SHARDS * PER_SHARD, vocab_size)) as writer:
        for shard in range(NUM_SHARDS):
            numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
            writer.write_shard(shard, [sequence(number, chosen, vocab_size) for number in numbers])
        writer.seal()
    return root


def values_of(found: CachedSequence) -> dict[str, npt.NDArray[Any]]:
    """Return all that is read of a sequence, by name."""
    return {"token_ids": found.token_ids, "target_mask": found.target_mask, **found.targets.arrays()}


def main() -> None:
    """Write both files, in whose place nothing may be."""
    archive, expected = DATA / f"format-{FORMAT_VERSION}.zip", DATA / f"format-{FORMAT_VERSION}.npz"
    if archive.exists():
        sys.exit(f"{archive} is there: what was written stays as it is; a change of the format has a new version")
    values: dict[str, npt.NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, kept in CACHES.items():
            root = write_golden(Path(folder) / name, **kept)
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # of 1980, whenever it is made
                file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
            for number, found in enumerate(open_cache(root)):
                values |= {f"{name}/{number}/{key}": value for key, value in values_of(found).items()}
    np.savez_compressed(expected, **values)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
