"""The description of a cache: a dataclass in, JSON out, and back.

The manifest holds everything that stage 2 must know, so that stage 2 repeats no setting of stage 1. It holds no clock,
host name or absolute path, so that the same capture gives the same bytes anywhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from todi_offline.cache.format.fingerprint import differences, tokenizer_differences
from todi_offline.cache.format.layout import FORMAT_VERSION, READABLE_VERSIONS, ArraySpec, CacheSettings, array_specs
from todi_offline.config import load_config, to_dict
from todi_offline.errors import CacheFormatError, CacheMismatchError, ConfigError

_LEFT_OUT = "left_out"  # of a recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The sequences that one capture added to a cache; its shards follow those of the parts before."""

    recipe: Mapping[str, Any]
    """How the data set was made."""
    content: str
    """Hash over the content keys of the whole data set, in order, sequences of earlier parts included."""
    num_sequences: int
    """Sequences that the capture added."""
    num_shards: int
    """Shards that hold these sequences."""
    versions: Mapping[str, str]
    """Versions of the libraries that made the part."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """The ids of the examples at which the teacher failed, each with the reason: their sequences are not here."""
        found: Mapping[str, str] = self.recipe.get(_LEFT_OUT, {})
        return found

    @property
    def planned(self) -> "Part":
        """The part as it was planned, before the teacher failed at any example."""
        recipe = {name: value for name, value in self.recipe.items() if name != _LEFT_OUT}
        return dataclasses.replace(self, recipe=recipe, num_sequences=self.num_sequences + len(self.left_out))

    def without(self, left_out: Mapping[str, str]) -> "Part":
        """Return the part as it is when some of its examples were left out, for these reasons."""
        recipe = {**self.recipe, _LEFT_OUT: dict(left_out)} if left_out else self.recipe
        return dataclasses.replace(self, recipe=recipe, num_sequences=self.num_sequences - len(left_out))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The identity and the settings of a cache."""

    settings: CacheSettings
    vocab_size: int
    """Ids that the tokenizer and the teacher's head know; a padded embedding may be larger."""
    teacher: Mapping[str, Any]
    """Fingerprint: hashes of config and weights, dtype, adapters, and a few facts for people."""
    tokenizer: Mapping[str, str]
    """Fingerprint: a hash for each part."""
    parts: tuple[Part, ...]
    """The captures that made the cache, in order; none while the first one runs."""
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Shards of the finished cache."""
        return sum(part.num_shards for part in self.parts)

    @property
    def arrays(self) -> Mapping[str, ArraySpec]:
        """The arrays of the cache by name."""
        return array_specs(self.settings, self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-able values."""
        return to_dict(self)

    @classmethod
    def from_json(cls, values: Any, where: str) -> "Manifest":
        """Read the values that `to_json` returned.

        Raises:
            CacheFormatError: the values are no manifest, or one of an unknown version.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("format_version"), int):
            raise CacheFormatError(f"{where} holds no todi_offline manifest; is this a cache made by `todi capture`?")
        if values["format_version"] not in READABLE_VERSIONS:
            raise CacheFormatError(
                f"{where} has format version {values['format_version']!r:.20}; this release reads versions "
                f"{', '.join(map(str, READABLE_VERSIONS))}: install a newer release of todi_offline"
            )
        missing = {field.name for field in dataclasses.fields(cls)} - values.keys()
        if missing:
            raise CacheFormatError(f"the manifest of {where} lacks {', '.join(sorted(missing))}")
        mappings = ("settings", "teacher", "tokenizer")
        wrong = [name for name in mappings if not isinstance(values[name], Mapping)]
        vocab_size = values["vocab_size"]
        if wrong or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
            raise CacheFormatError(f"the manifest of {where} has a wrong type or range: {wrong or vocab_size}")
        try:
            settings = load_config(CacheSettings, overrides=values["settings"])
        except ConfigError as error:
            raise CacheFormatError(f"the manifest of {where} has invalid settings: {error}") from error
        if settings.k > vocab_size:
            raise CacheFormatError(f"the manifest of {where} says k = {settings.k} of a vocabulary of {vocab_size}")
        return cls(
            settings=settings,
            vocab_size=vocab_size,
            teacher=values["teacher"],
            tokenizer=values["tokenizer"],
            parts=read_parts(values["parts"], where),
            format_version=values["format_version"],
        )


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """Describe in words how the data of a part were made; a chat template is left out, for it is a page of text."""
    shown = {name: value for name, value in recipe.items() if value is not None and name != "chat_template"}
    if _LEFT_OUT in shown:
        shown[_LEFT_OUT] = f"{len(shown[_LEFT_OUT]):,} examples"
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def identity_differences(
    found: Manifest,
    wanted: Manifest,
    where: tuple[str, str],
    names: Sequence[str] = ("teacher", "tokenizer", "vocab_size", "settings"),
) -> list[str]:
    """Return a line for each difference between two caches that keeps their rows out of one cache.

    Of a tokenizer only the parts that decide ids count; see `tokenizer_differences`.
    """
    plain = [name for name in names if name != "tokenizer"]
    mine, other = ({name: values[name] for name in plain} for values in (found.to_json(), wanted.to_json()))
    lines = differences(mine, other, where)
    if "teacher" in names and _identified_otherwise(found.teacher, wanted.teacher):
        lines = [line for line in lines if not line.startswith("teacher.")] + [_otherwise_identified(found, where)]
    if "tokenizer" in names:
        lines += [f"tokenizer.{line}" for line in tokenizer_differences(found.tokenizer, wanted.tokenizer, where)]
    return lines


def _identified_otherwise(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    both_have_weights = {"weights"} <= found.keys() & wanted.keys()
    return both_have_weights and ("identified_by" in found) != ("identified_by" in wanted)


def _otherwise_identified(found: Manifest, where: tuple[str, str]) -> str:
    by_files, in_memory = where if "identified_by" in found.teacher else where[::-1]
    return (
        f"teacher: its weights in memory identify it {in_memory}, as in earlier releases, and the files of its "
        f"checkpoint identify it {by_files}; the two cannot be compared (in Python, pass the teacher in memory: "
        "as_teacher(load_model(PATH), load_tokenizer(PATH)))"
    )


def require_same_tokenizer(found: Mapping[str, str], manifest: Manifest, what: str) -> None:
    """Refuse a tokenizer whose ids mean something else than the ids of the cache; its chat template does not matter.

    Raises:
        CacheMismatchError: the tokenizers differ; names the parts that do.
    """
    lines = tokenizer_differences(found, manifest.tokenizer, (f"in {what}", "in the cache"))
    if lines:
        raise CacheMismatchError(
            f"the tokenizer of {what} is not the one that the cache was captured with ({'; '.join(lines)}); "
            "train a student that has the teacher's tokenizer, or capture again with this one"
        )


def read_parts(values: Any, where: str) -> tuple[Part, ...]:
    """Return the parts after checking the type and range of every value."""
    kinds = {"recipe": Mapping, "content": str, "num_sequences": int, "num_shards": int, "versions": Mapping}
    if not isinstance(values, list):
        raise CacheFormatError(f"the manifest of {where} has the parts {values!r:.50}, expected a list")
    for part in values:
        right = isinstance(part, Mapping) and part.keys() == kinds.keys()
        right = right and all(isinstance(part[name], kind) for name, kind in kinds.items())
        right = right and isinstance(part["recipe"].get(_LEFT_OUT, {}), Mapping)
        if not right or not all(1 <= part[name] < 2**31 for name in ("num_sequences", "num_shards")):
            raise CacheFormatError(f"the manifest of {where} has a part of a wrong type or range: {part!r:.200}")
    return tuple(Part(**part) for part in values)
