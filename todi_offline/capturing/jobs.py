"""A data set and a description of the teacher in, the tasks of a cache's shards out."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping

from todi_offline.cache.format.keys import ContentKeys
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.manifest import Manifest, Part
from todi_offline.cache.format.notes import Note
from todi_offline.cache.planning import CapturePlan, ShardPlan, plan_capture
from todi_offline.cache.reuse import open_reusable
from todi_offline.cache.store import open_store
from todi_offline.capturing.attempts import Attempt
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import TeacherDescription
from todi_offline.capturing.work import ShardTask
from todi_offline.data import Examples
from todi_offline.targets.sparse import check_capture


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What is to be captured, by which teacher."""

    examples: Examples
    keys: ContentKeys
    manifest: Manifest
    """Of the cache that the data set would make by itself."""

    @classmethod
    def of(cls, examples: Examples, described: TeacherDescription, settings: CacheSettings) -> "Job":
        """Describe the capture of a whole data set.

        Raises:
            TargetsError: the vocabulary has no such targets.
            DataError: an example holds an id that the teacher does not know.
        """
        examples.require_ids(described.vocab_size)
        require_targets(described.vocab_size, settings)
        keys = examples.content_keys()
        return cls(examples, keys, describe_cache(described, settings, (_part(examples, keys, described),)))

    def plan(self, config: CaptureConfig) -> CapturePlan:
        """Return which sequences are missing in the cache, and lay them into shards.

        Raises:
            CacheError: the cache or one to reuse is of another teacher, tokenizer or settings, or cannot be read.
            DataError: an example does not fit into a shard.
        """
        open_reusable(config.reuse, self.manifest)  # refused before anything is begun
        return plan_capture(open_store(config.out), self.manifest, self.keys, self.examples.num_tokens)

    def attempts(self, plan: CapturePlan, shards: Iterable[ShardPlan], notes: Mapping[int, Note]) -> Iterator[Attempt]:
        """Yield these shards, each when it is asked for; `notes` has those at which an earlier run died."""
        for shard in shards:
            indices = plan.sequences[shard.start : shard.stop].tolist()
            yield Attempt.of(ShardTask.of(shard.index, self.examples, indices), notes.get(shard.index))

    def name_in(self, plan: CapturePlan, shard: int, number: int) -> str:
        """Return the id of an example of a shard."""
        start = plan.shards[shard - plan.shards[0].index].start
        return self.examples[int(plan.sequences[start + number])].id


def require_targets(vocab_size: int, settings: CacheSettings) -> None:
    """Refuse settings whose targets a vocabulary of this size does not have.

    Raises:
        TargetsError: with what can be chosen.
    """
    at = settings.tail_temperature if settings.tail_samples else None
    check_capture(vocab_size, settings.k, settings.temperatures, at)


def describe_cache(described: TeacherDescription, settings: CacheSettings, parts: tuple[Part, ...] = ()) -> Manifest:
    """Return the manifest of a cache of this teacher."""
    return Manifest(
        settings=settings,
        vocab_size=described.vocab_size,
        teacher=described.teacher,
        tokenizer=described.tokenizer,
        parts=parts,
    )


def _part(examples: Examples, keys: ContentKeys, described: TeacherDescription) -> Part:
    """Describe a data set as a capture of all of it."""
    engine = {"engine": described.engine} if described.engine else {}
    return Part(
        recipe=json.loads(json.dumps(examples.recipe | engine)),
        content=keys.digest(),
        num_sequences=len(examples),
        num_shards=0,
        versions=described.versions,
    )
