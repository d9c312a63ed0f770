"""A cache whose files are changed in every way and put back, and the changes."""

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.fake_cache import write_cache
from todi_offline.cache import shard_file as shard_file_module
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.format import root as root_module
from todi_offline.cache.format.layout import ArraySpec
from todi_offline.cache.format.names import ROOT_KEY, record_key
from todi_offline.cache.format.records import ObjectSum
from todi_offline.cache.objects import read_root
from todi_offline.cache.reader import open_cache
from todi_offline.cache.store import LocalStore
from todi_offline.errors import TodiError
from todi_offline.training.stream import CacheDataset, Collator

Files = dict[str, bytes]

NUM_SHARDS, PER_SHARD = 2, 3
ARRAYS = ("token_ids", "target_mask", "topk_ids", "topk_logprobs", "label_logprob", "tail_logprobs")
ABSENT = 2**64 - 1
"""What the index of a shard has for a chunk that is not stored."""
MOST_BYTES = 100 * 2**20
"""What reading a cache of some 20 kB may take."""


def fuzzed(tmp_path_factory: pytest.TempPathFactory, **kept: str) -> "Fuzzed":
    root = tmp_path_factory.mktemp("fuzzed") / "cache"
    return Fuzzed(write_cache(root, num_shards=NUM_SHARDS, per_shard=PER_SHARD, **kept))


class Fuzzed:
    """A cache whose files are changed and put back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        self.manifest = read_root(LocalStore(root)).manifest

    def survives(self, changed: Files) -> None:
        """Whatever reads the cache with these files raises nothing but errors of ours, and takes little memory."""
        for read in (self.verify, self.train, self.open_unsealed):
            with bounded_memory(), contextlib.suppress(TodiError):
                self.with_files(changed, read)

    def with_files(self, changed: Files, read: Callable[[], None]) -> None:
        """Read with other files, then put them back."""
        for key, data in changed.items():
            (self.root / key).write_bytes(data)
        shard_file_module._read_index.cache_clear()  # files of one name, size and instant
        try:
            read()
        finally:
            for key in changed:
                (self.root / key).write_bytes(self.files[key])

    def verify(self) -> None:
        verify_cache(self.root)

    def train(self) -> None:
        dataset = CacheDataset(open_cache(self.root))
        for index in range(len(dataset)):
            Collator()([dataset[index]])

    def open_unsealed(self) -> None:
        open_cache(self.root, allow_unsealed=True)

    def with_right_sums(self, changed: Files) -> Files:
        """Add the commit records and the root that name these files as they are."""
        changed = dict(changed)
        for shard in range(NUM_SHARDS):
            key = record_key(shard)
            values = json.loads(self.files[key])
            if key not in changed and changed.keys() & values["objects"].keys():
                values["objects"] = {name: self._sum(name, changed) for name in values["objects"]}
                changed[key] = json.dumps(values).encode()
        if ROOT_KEY not in changed:
            records = [changed.get(record_key(shard), self.files[record_key(shard)]) for shard in range(NUM_SHARDS)]
            values = json.loads(self.files[ROOT_KEY])
            values["commits"] = [ObjectSum.of(record).to_json() for record in records]
            changed[ROOT_KEY] = as_root(values)
        return changed

    def _sum(self, key: str, changed: Files) -> Any:
        data, spec = changed.get(key, self.files[key]), self.manifest.arrays.get(key.partition("/")[0])
        return ObjectSum.of(data, sums_at_any_place(spec, data) if spec and "/c/" in key else b"").to_json()


def as_root(values: Any) -> bytes:
    """Return the values of a root as its object, with the checksum that they have."""
    if isinstance(values, dict) and "crc32c" in values:
        body = {name: value for name, value in values.items() if name != "crc32c"}
        values = body | {"crc32c": root_module._checksum(body)}
    return root_module._to_bytes(values)


def sums_at_any_place(spec: ArraySpec, data: bytes) -> bytes:
    """Return the last four bytes of each stored chunk, or zeros where its index leads out of the object."""
    size = spec.chunks_per_shard * 16
    index = np.frombuffer(data[-size - 4 : -4].rjust(size, b"\0"), "<u8").reshape(-1, 2)
    stops = [start + length for start, length in index[(index != ABSENT).any(1)].tolist()]
    return b"".join(data[stop - 4 : stop] if 4 <= stop <= len(data) else bytes(4) for stop in stops)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within, MOST_BYTES may be touched, and 4 GiB be asked for: whoever asks for more meets a MemoryError."""
    begun = _status("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 2**32, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken = _status("VmHWM") - begun
    assert taken < MOST_BYTES, f"{taken:,} bytes"


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def fuzz(check: Callable[..., None], count: int, *strategies: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    is_few = count < FROM_A_NEW_SEED
    settings(max_examples=count, derandomize=is_few, database=None, deadline=None, suppress_health_check=checks)(
        given(*strategies)(check)
    )()


FROM_A_NEW_SEED = 100
"""From so many examples on every run draws others, and a failure names its seed; fewer are the same each time."""


few_or_many = pytest.mark.parametrize(
    "count", [12, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)


EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "write", "insert", "cut", "end"]), st.floats(0, 1), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)
"""Changes of bytes: what, how far into the file, and what is written there."""


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, piece in edits:
        at = int(where * len(data))
        rest = data[at:]
        if kind == "flip" and rest:
            rest = bytes([rest[0] ^ ((piece or b"\1")[0] or 1)]) + rest[1:]
        elif kind == "write":
            rest = piece + rest[len(piece) :]
        elif kind == "insert":
            rest = piece + rest
        elif kind == "cut":
            rest = rest[len(piece) :]
        else:
            rest = b""
        data = data[:at] + rest
    return data


def with_crc(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")
