"""A small teacher and chats on the disk, the command that captures them, and the sums of what the command leaves."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from conftest import Row

from support.tiny_models import save_llama
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store.remote import RemoteStore
from todi_offline.capturing import capture

SMALL = {"k": 4, "tail_samples": 1, "shard_tokens": 4096, "codec": "fast", "batch_tokens": 1024}
LENGTHS = {"max_length": 128, "max_prompt_length": 64}

Sums = dict[str, str]


class Setting:
    """A teacher and data on the disk, and the cache that one process makes of them."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.folder = folder
        self.rows = rows
        self.data = folder / "chats.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.teacher = save_llama(folder / "teacher", num_hidden_layers=1)

    def words(self, out: Path | str, *more: str, **changes: Any) -> list[str]:
        """The arguments of `todi`."""
        named = {"teacher": self.teacher, "data": self.data, "out": out, "device": "cpu", **SMALL, **LENGTHS, **changes}
        options = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return ["capture", "--json", *options, *more]

    @functools.cached_property
    def whole_root(self) -> Path:
        root = self.folder / "whole"
        capture(str(self.teacher), str(self.data), root, device="cpu", **SMALL, **LENGTHS)
        return root

    @functools.cached_property
    def whole(self) -> Sums:
        return sums_of(self.whole_root)


def sums_of(root: Path) -> Sums:
    """The SHA-256 of every file of a cache."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def sums_in_bucket(place: str) -> Sums:
    """The SHA-256 of every object of a cache, the lock apart."""
    store = RemoteStore(place)
    return {key: hashlib.sha256(store.read(key, 2**26)).hexdigest() for key in store.find() if key != ".lock"}


def records_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "commits").glob("*.json"))


def example_of(whole_root: Path, shard: int, number: int = 2) -> str:
    """An example of a shard of a whole cache, by default the third one."""
    return str(open_cache(whole_root).sequences.to_pandas().query(f"shard == {shard}")["id"].iloc[number])
