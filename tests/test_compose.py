"""Random sequences of operations on caches: the result always holds what a plain list holds.

A random program captures, is killed, goes on, appends, takes subsets, merges, reuses, exports, imports, damages and
repairs. After each step every cache that it touched is whole and holds exactly its entries, with their rows.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.composing import (
    ONE_ZERO,
    THREE_ZEROS,
    TWO_ZEROS,
    Entry,
    assert_holds,
    capture_into,
    digest_of,
    key_of,
    length_of,
)
from support.damage import contents_of
from support.fake_cache import replace_file, settings
from support.stopping import StoppedError

from todi_offline.cache.check.repair import repair_cache
from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.choosing import choose
from todi_offline.cache.convert.export import export_cache
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.convert.merge import merge_caches
from todi_offline.cache.convert.subset import subset_cache
from todi_offline.cache.format.layout import ENCODINGS, CacheSettings
from todi_offline.cache.reader import holds, open_cache, union
from todi_offline.errors import CacheIncompleteError, CacheMismatchError, TargetsError

MEMORY = Path("/dev/shm")  # where there is one, files cost little
STRETCH = 20  # a shard of a capture has a few sequences
POOL = (*range(14), *ONE_ZERO[:6], *TWO_ZEROS[:4], *THREE_ZEROS)
NUMBERS = st.lists(st.sampled_from(POOL), min_size=1, max_size=5)
PICKS = st.integers(0, 2**16)
PAIRS = st.lists(PICKS, min_size=1, max_size=2)
KINDS = tuple(settings(encoding=encoding, k=k, codec="fast") for encoding in ENCODINGS for k in (6, 4, 0))


@dataclass
class Held:
    """A cache on the disk, and what it must hold."""

    root: Path
    settings: CacheSettings
    entries: list[Entry]
    digests: list[str]
    """Of the content of its parts."""
    makers: list[Callable[[], None]] = field(default_factory=list)
    """What made it, one a part; the same calls again change nothing."""
    sources: list[tuple["Held", int]] = field(default_factory=list)
    """The caches that it was made of, and how many parts these had then."""
    unfinished: Callable[[], None] | None = None
    """What finishes a capture that was killed."""
    unfinished_digest: str | None = None
    """Of the content of its data."""
    is_touched: bool = True

    @property
    def numbers(self) -> list[int]:
        return [entry.number for entry in self.entries]

    @property
    def can_be_made_again(self) -> bool:
        is_same = all(len(source.digests) == parts for source, parts in self.sources)
        return is_same and len(self.makers) == len(self.digests) and not self.unfinished


class Caches(RuleBasedStateMachine):
    """Programs over a few caches in one folder."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="compose", dir=MEMORY if MEMORY.is_dir() else None))
        self.caches: list[Held] = []
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def place(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def pick(self, number: int, among: Sequence[Held] | None = None) -> Held:
        among = self.caches if among is None else among
        return among[number % len(among)]

    def add(self, held: Held) -> None:
        self.caches.append(held)
        if len(self.caches) > 5:  # the oldest that nothing was made of
            used = {id(source) for other in self.caches for source, _ in other.sources}
            gone = next((other for other in self.caches[:-1] if id(other) not in used), None)
            if gone is not None:
                self.caches.remove(gone)
                shutil.rmtree(gone.root)

    # Rules

    @initialize(numbers=NUMBERS, kind=st.sampled_from(KINDS))
    def begin(self, numbers: list[int], kind: CacheSettings) -> None:
        self.capture(numbers, kind)

    @rule(numbers=NUMBERS, kind=st.sampled_from(KINDS))
    def capture(self, numbers: list[int], kind: CacheSettings) -> None:
        root = self.place()

        def make() -> None:
            capture_into(root, numbers, kind, stretch=STRETCH)

        make()
        entries = [Entry.captured(number, kind) for number in numbers]
        self.add(Held(root, kind, entries, [digest_of(numbers)], [make]))

    @rule(numbers=NUMBERS, pick=PICKS, stop_after=st.integers(0, 3))
    def append(self, numbers: list[int], pick: int, stop_after: int) -> None:
        """Append to a cache; below 3, `stop_after` is the number of shards after which the capture is killed."""
        held = self.pick(pick)

        def make() -> None:
            capture_into(held.root, numbers, held.settings, stretch=STRETCH)

        new = [number for number in numbers if number not in held.numbers]
        if held.unfinished:
            if digest_of(numbers) == held.unfinished_digest:
                held.unfinished()
                held.is_touched = True
            elif new:
                with pytest.raises(CacheMismatchError, match="abandon"):
                    make()
            return
        held.is_touched = True
        digest = digest_of(numbers)
        if digest in held.digests or not new:
            make()
            return

        def finish() -> None:
            make()
            held.entries += [Entry.captured(number, held.settings) for number in new]
            held.digests.append(digest)
            held.makers.append(make)
            held.unfinished = None

        if stop_after == 3:
            finish()
            return
        with pytest.raises(StoppedError):
            capture_into(held.root, numbers, held.settings, stop_after=stop_after, stretch=STRETCH)
        held.unfinished, held.unfinished_digest = finish, digest

    @rule(numbers=NUMBERS, kind=st.sampled_from(KINDS), stop_after=st.integers(0, 2))
    def kill(self, numbers: list[int], kind: CacheSettings, stop_after: int) -> None:
        root = self.place()
        with pytest.raises(StoppedError):
            capture_into(root, numbers, kind, stop_after=stop_after, stretch=STRETCH)
        with pytest.raises(CacheIncompleteError):
            open_cache(root)
        capture_into(root, numbers, kind, stretch=STRETCH)
        self.capture(numbers, kind)
        assert contents_of(root) == contents_of(self.caches[-1].root)
        shutil.rmtree(root)

    @precondition(lambda self: any(held.unfinished for held in self.caches))
    @rule(pick=PICKS)
    def go_on(self, pick: int) -> None:
        held = self.pick(pick, [held for held in self.caches if held.unfinished])
        assert held.unfinished is not None
        held.unfinished()
        held.is_touched = True

    @precondition(lambda self: any(held.unfinished for held in self.caches))
    @rule(pick=PICKS)
    def abandon(self, pick: int) -> None:
        held = self.pick(pick, [held for held in self.caches if held.unfinished])
        assert repair_cache(held.root, abandon=True).is_whole
        held.unfinished = None
        held.is_touched = True

    @rule(
        pick=PICKS,
        by=st.sampled_from(["ids", "keys", "like", "where", "all"]),
        other=PICKS,
        limit=st.none() | st.integers(1, 5),
        k=st.integers(0, 6),
        temperatures=st.sampled_from([(1.0, 2.0), (2.0, 1.0), (1.0,), (2.0,)]),
        samples=st.integers(0, 3),
        encoding=st.sampled_from(ENCODINGS),
    )
    def subset(
        self,
        pick: int,
        by: str,
        other: int,
        limit: int | None,
        k: int,
        temperatures: tuple[float, ...],
        samples: int,
        encoding: str,
    ) -> None:
        held, like = self.pick(pick), self.pick(other)
        old = held.settings
        wanted = [number for number in held.numbers if number in like.numbers]
        (self.folder / "ids").write_text("".join(f"fake:{number}\n" for number in wanted))
        (self.folder / "keys").write_text("".join(f"{key_of(number).hex()}\n" for number in like.numbers))
        conditions: dict[str, Any] = {"ids": None, "keys": None, "like": None, "expression": None, "limit": limit}
        named = {"ids": self.folder / "ids", "keys": self.folder / "keys", "like": str(like.root)}
        is_wanted: Callable[[int], bool] = lambda number: number in like.numbers  # noqa: E731
        if by in named:
            conditions[by] = named[by]
        elif by == "where":
            conditions["expression"], is_wanted = "num_tokens > 50", lambda number: length_of(number) > 50
        else:
            is_wanted = lambda number: True  # noqa: E731
        kept = [t for t in temperatures if t in old.temperatures] or list(old.temperatures)
        samples = min(samples, old.tail_samples) if old.tail_temperature in kept else 0
        if not min(k, old.k) and not samples:
            return
        changes: dict[str, Any] = {
            "k": min(k, old.k),
            "temperatures": tuple(kept),
            "tail_samples": samples,
            "encoding": encoding,
        }
        root, entries = self.place(), [entry for entry in held.entries if is_wanted(entry.number)][:limit]

        def make() -> None:
            opened = open_cache(held.root)
            chosen, recipe = choose(opened, **conditions)
            subset_cache(opened, str(root), chosen, recipe, **changes)

        if not entries:
            with pytest.raises(CacheMismatchError, match="meets the conditions"):
                make()
        elif old.encoding in ("q8", "root8") and encoding != old.encoding:
            with pytest.raises(CacheMismatchError, match="too coarse to be stored as"):
                make()
            assert not root.exists()
        elif encoding == "bf16_logit" != old.encoding:
            with pytest.raises(TargetsError, match="bf16_logit"):
                make()
            assert not root.exists()
        else:
            make()
            chosen = dataclasses.replace(old, **changes)
            entries = [entry.stored_as(encoding) for entry in entries]
            digest = digest_of([entry.number for entry in entries])
            # The files of ids and keys are written anew by the next subset, so it cannot be made again after that.
            makers = [make] if by not in ("ids", "keys") else []
            sources = [(held, len(held.digests)), (like, len(like.digests))]
            self.add(Held(root, chosen, entries, [digest], makers, sources))

    @rule(picks=st.lists(PICKS, min_size=2, max_size=3))
    def merge(self, picks: list[int]) -> None:
        first = self.pick(picks[0])
        alike = [held for held in self.caches if held.settings == first.settings]
        others = [self.pick(pick, alike if len(alike) > 1 else None) for pick in picks[1:]]
        members, root = [first, *others], self.place()

        def make() -> None:
            merge_caches([str(held.root) for held in members], str(root))

        if any(held.settings != first.settings for held in members):
            with pytest.raises(CacheMismatchError, match=r"settings\."):
                make()
            return
        make()
        found = open_cache(root)
        digests = [part.content for part in found.manifest.parts]
        assert set(digests) <= {digest for held in members for digest in held.digests}
        sources = [(held, len(held.digests)) for held in members]
        made = Held(root, first.settings, first_of_each(members), digests, [make], sources)
        made.makers *= len(digests)  # one call makes all parts
        self.add(made)

    @rule(picks=PAIRS, numbers=NUMBERS, k=st.integers(0, 6), samples=st.integers(0, 3))
    def reuse(self, picks: list[int], numbers: list[int], k: int, samples: int) -> None:
        sources = [self.pick(pick) for pick in picks]
        k, samples = min(k, sources[0].settings.k), min(samples, sources[0].settings.tail_samples)
        if not k and not samples:
            return
        asked = dataclasses.replace(sources[0].settings, k=k, tail_samples=samples)
        root = self.place()

        def make() -> None:
            capture_into(root, numbers, asked, [held.root for held in sources], stretch=STRETCH)

        if not all(can_serve(held.settings, asked) for held in sources):
            with pytest.raises(CacheMismatchError, match="cannot be reused"):
                make()
            return
        # The committed shards of a capture that was killed serve too, which the list of entries does not say.
        if any(held.unfinished for held in sources):
            return
        make()
        known = first_of_each(sorted(sources, key=lambda held: holds(held.settings) != holds(asked)))
        rows = {entry.key: entry for entry in known}
        entries = [rows.get(key_of(number), Entry.captured(number, asked)) for number in numbers]
        made = [(held, len(held.digests)) for held in sources]
        self.add(Held(root, asked, entries, [digest_of(numbers)], [make], made))

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def union(self, picks: list[int]) -> None:
        members = [self.pick(pick) for pick in picks]
        shared = set.intersection(*(set(held.settings.temperatures) for held in members))
        if not shared:
            with pytest.raises(CacheMismatchError, match="temperatures"):
                union([open_cache(held.root) for held in members])
            return
        k, samples = (min(getattr(held.settings, name) for held in members) for name in ("k", "tail_samples"))
        if not k and not samples:
            with pytest.raises(CacheMismatchError, match="tail_samples"):
                union([open_cache(held.root) for held in members])
            return
        found = union([open_cache(held.root) for held in members])
        assert (found.manifest.settings.k, found.manifest.settings.tail_samples) == (k, samples)
        assert_holds(found, first_of_each(members))

    @rule(pick=PICKS, k=st.integers(0, 6), samples=st.integers(0, 3))
    def narrow(self, pick: int, k: int, samples: int) -> None:
        held = self.pick(pick)
        old = held.settings
        k, samples = min(k, old.k), min(samples, old.tail_samples)
        if not k and not samples:
            return
        asked = dataclasses.replace(old, k=k, tail_samples=samples)
        assert_holds(union([open_cache(held.root)], asked), first_of_each([held]))

    @rule(pick=PICKS)
    def export_and_import(self, pick: int) -> None:
        held, root, table = self.pick(pick), self.place(), self.folder / f"{self.count}.parquet"
        export_cache(open_cache(held.root), table)

        def make() -> None:
            import_table(table, str(root))

        make()
        self.add(Held(root, held.settings, list(held.entries), [digest_of(held.numbers)], [make]))

    @precondition(lambda self: any(held.can_be_made_again for held in self.caches))
    @rule(pick=PICKS, file=PICKS, kind=st.sampled_from(["flip", "cut", "lose", "zero", "stray"]), place=PICKS)
    def damage_and_repair(self, pick: int, file: int, kind: str, place: int) -> None:
        """Damage a file, repair the cache and make it again: it has the same bytes as before."""
        held = self.pick(pick, [held for held in self.caches if held.can_be_made_again])
        before = contents_of(held.root)
        key = sorted(before)[file % len(before)]
        damage(held.root / key, before[key], kind, place)
        if contents_of(held.root) == before:
            return
        problems = verify_cache(held.root)
        assert problems or key.endswith("zarr.json")  # of which other readers alone read some parts
        repair_cache(held.root)
        for stray in held.root.rglob("stray.bin"):  # not ours to delete, but a test's
            stray.unlink()
        for number, make in enumerate(held.makers):
            try:
                make()
            except CacheIncompleteError:  # a shard of a later part is still to be made
                assert number + 1 < len(held.makers)
        assert contents_of(held.root) == before

    # What holds after each step

    @invariant()
    def every_cache_is_whole_and_holds_its_entries(self) -> None:
        for held in self.caches:
            if not held.is_touched:
                continue
            problems = [problem for problem in verify_cache(held.root) if not (held.unfinished and problem.is_note)]
            assert not problems, problems
            found = open_cache(held.root)
            assert found.manifest.settings == held.settings
            assert [part.content for part in found.manifest.parts] == held.digests
            assert_holds(found, held.entries)
            held.is_touched = False


def first_of_each(members: Sequence[Held]) -> list[Entry]:
    """Return the entries of several caches, of each content the first."""
    first: dict[bytes, Entry] = {}
    for held in members:
        for entry in held.entries:
            first.setdefault(entry.key, entry)
    return list(first.values())


def can_serve(found: CacheSettings, asked: CacheSettings) -> bool:
    is_wide = found.k >= asked.k and found.tail_samples >= asked.tail_samples
    return is_wide and found.encoding == asked.encoding and set(found.temperatures) >= set(asked.temperatures)


def damage(path: Path, data: bytes, kind: str, place: int) -> None:
    """Damage a file under its own name alone: other caches may be linked to it."""
    if kind == "lose":
        path.unlink()
    elif kind == "stray":
        path.with_name("stray.bin").write_bytes(b"stray")
    else:
        at = place % len(data)
        changed = {
            "flip": data[:at] + bytes([data[at] ^ 1 << place % 8]) + data[at + 1 :],
            "cut": data[:at],
            "zero": data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :],
        }
        replace_file(path, changed[kind])


def run_programs(monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here loses power
    chosen |= {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    phases = [Phase.generate, Phase.shrink]
    run_state_machine_as_test(Caches, settings=hypothesis_settings(phases=phases, **chosen))


def test_random_programs_leave_correct_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    run_programs(monkeypatch, max_examples=60, stateful_step_count=6, derandomize=True)


@pytest.mark.slow
def test_thousands_of_random_programs_leave_correct_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    run_programs(monkeypatch, max_examples=2000, stateful_step_count=12, derandomize=False)
