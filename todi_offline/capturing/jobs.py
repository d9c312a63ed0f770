"""Settings, a data set and a description of the teacher in, the tasks of all shards out."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.planning import CapturePlan, ShardPlan, plan_capture
from todi_offline.cache.reader import Cache
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import TeacherDescription
from todi_offline.capturing.work import ShardTask
from todi_offline.data import Examples

_RECORDED = ("todi-offline", "numpy", "pyarrow", "numcodecs", "pcodec")


@dataclass(frozen=True, slots=True)
class Job:
    """What a capture has to do, and from what."""

    config: CaptureConfig
    described: TeacherDescription
    examples: Examples
    plan: CapturePlan
    reused: Cache | None
    places: npt.NDArray[np.int64]
    """Where `reused` has each example, or -1."""


def plan_job(config: CaptureConfig, described: TeacherDescription, examples: Examples) -> Job:
    """Return what is to be captured and what is copied.

    Raises:
        CacheError: the cache or one to reuse is of another teacher, tokenizer or settings, or cannot be read.
        DataError: an example does not fit into a shard.
    """
    manifest = describe_cache(described, config.cache)
    reused = open_reusable(config.reuse, manifest)
    keys = examples.content_keys()
    manifest = dataclasses.replace(manifest, parts=(_part(examples, keys, described),))
    plan = plan_capture(open_store(config.out), manifest, keys, examples.num_tokens)
    places = np.full(len(keys), -1) if reused is None else reused.content_keys.find(keys)
    return Job(config, described, examples, plan, reused, places)


def describe_cache(described: TeacherDescription, settings: CacheSettings) -> Manifest:
    """Return the manifest of a cache of this teacher that has no part yet."""
    return Manifest(
        settings=settings,
        vocab_size=described.vocab_size,
        teacher=described.teacher,
        tokenizer=described.tokenizer,
        parts=(),
    )


def tasks_of(job: Job, shards: Sequence[ShardPlan]) -> Iterator[ShardTask]:
    """Yield the work of these shards, each when it is asked for."""
    for shard in shards:
        members = job.plan.sequences[shard.start : shard.stop]
        yield ShardTask(shard.index, job.examples.to_stream(members.tolist()), tuple(job.places[members].tolist()))


def _part(examples: Examples, keys: ContentKeys, described: TeacherDescription) -> Part:
    """Describe a data set as a capture of all of it."""
    engine = {"engine": described.engine} if described.engine else {}
    return Part(
        recipe=json.loads(json.dumps(examples.recipe | engine)),
        content=keys.digest(),
        num_sequences=len(examples),
        num_shards=0,
        versions={name: version(name) for name in _RECORDED} | described.versions,
    )
