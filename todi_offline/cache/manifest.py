"""What a cache says of itself: a dataclass in, the attributes of its Zarr group out, and back.

Everything that stage 2 must know stands here, so that it repeats no setting of stage 1. No clock, host name or
absolute path does, so that the same capture gives the same bytes anywhere.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from todi_offline.cache.fingerprint import differences
from todi_offline.cache.layout import FORMAT_VERSION, ArraySpec, CacheSettings, array_specs
from todi_offline.config import load_config, to_dict
from todi_offline.errors import CacheFormatError, CacheMismatchError, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The identity and the settings of a cache."""

    settings: CacheSettings
    vocab_size: int
    """Ids that the tokenizer knows; a padded embedding may be larger."""
    teacher: Mapping[str, Any]
    """Fingerprint: hashes of config and weights, dtype, adapters, and a few facts for people."""
    tokenizer: Mapping[str, str]
    """Fingerprint: a hash for each part."""
    data: Mapping[str, Any]
    """The recipe of the data set, and the plan that it led to."""
    versions: Mapping[str, str]
    """Versions of the libraries that made the cache."""
    format_version: int = FORMAT_VERSION

    @property
    def arrays(self) -> Mapping[str, ArraySpec]:
        """The arrays of the cache by name."""
        return array_specs(self.settings, self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-able values."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: Any, where: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            CacheFormatError: it is not a manifest, or one of another version.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("format_version"), int):
            raise CacheFormatError(f"{where} holds no todi_offline manifest; is this a cache made by `todi capture`?")
        if values["format_version"] != FORMAT_VERSION:
            raise CacheFormatError(
                f"{where} is of format version {values['format_version']}, this release reads version "
                f"{FORMAT_VERSION}; install a release of todi_offline that reads it"
            )
        missing = {field.name for field in dataclasses.fields(cls)} - values.keys()
        if missing:
            raise CacheFormatError(f"the manifest of {where} lacks {', '.join(sorted(missing))}")
        mappings = ("settings", "teacher", "tokenizer", "data", "versions")
        wrong = [name for name in mappings if not isinstance(values[name], Mapping)]
        vocab_size = values["vocab_size"]
        if wrong or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
            raise CacheFormatError(f"the manifest of {where} has a wrong type or range: {wrong or vocab_size}")
        try:
            settings = load_config(CacheSettings, overrides=values["settings"])
        except ConfigError as error:
            raise CacheFormatError(f"the manifest of {where} has impossible settings: {error}") from error
        return cls(settings=settings, vocab_size=vocab_size, **{name: values[name] for name in mappings[1:]})


def require_same_tokenizer(found: Mapping[str, str], manifest: Manifest, what: str) -> None:
    """Refuse a tokenizer that is not the one whose ids the cache holds.

    Raises:
        CacheMismatchError: with the parts that differ, side by side.
    """
    lines = differences(found, manifest.tokenizer, (f"in {what}", "in the cache"))
    if lines:
        raise CacheMismatchError(
            f"the tokenizer of {what} is not the one that the cache was captured with ({'; '.join(lines)}); "
            "train a student that has the teacher's tokenizer, or capture again with this one"
        )


def _plain(value: Any) -> Any:
    return to_dict(value) if dataclasses.is_dataclass(value) else value
