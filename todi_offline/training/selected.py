"""A cache and a data set in; the sequences of the cache that are the examples of the data set out."""

from dataclasses import dataclass

import numpy as np

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache, select
from todi_offline.data import DataConfig, load_examples, recorded_settings
from todi_offline.errors import CacheIncompleteError, ModelError
from todi_offline.models.loading import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectedData:
    """Which examples of the caches to train on; all of them by default."""

    data: str | None = None
    """Train on exactly the examples of this data set, which the cache must hold; by default on all of the cache."""
    split: str | None = None
    """The split of this data set."""
    limit: int | None = None
    """Use only this many rows of this data set, the first ones."""
    max_length: int | None = None
    """Cut an example after this many tokens; by default as the first cache's capture did."""
    max_prompt_length: int | None = None
    """Cut a prompt to this many tokens; by default as the first cache's capture did."""


def select_data(cache: Cache, data: SelectedData, tokenizer: Tokenizer | None) -> Cache:
    """Return the sequences of a cache that are the examples of a data set, in its order.

    Raises:
        CacheMismatchError: the tokenizer differs from the cache's.
        CacheIncompleteError: the cache lacks an example; the message names a few and the command that captures them.
        DataError: the data set cannot be read.
    """
    if tokenizer is None:
        raise ModelError("finding a data set in a cache needs the student's tokenizer; pass tokenizer")
    require_same_tokenizer(tokenizer_fingerprint(tokenizer), cache.manifest, "the student")
    recipe = cache.manifest.parts[0].recipe
    lengths = {name: getattr(data, name) or recipe.get(name) for name in ("max_length", "max_prompt_length")}
    known = {name: value for name, value in lengths.items() if isinstance(value, int)}
    settings = recorded_settings(recipe) | known
    examples = load_examples(
        DataConfig(data=data.data or "", split=data.split, limit=data.limit, **settings), tokenizer
    )
    indices = cache.content_keys.find(examples.content_keys())
    if missing := np.flatnonzero(indices < 0).tolist():
        names = ", ".join(examples[index].id for index in missing[:3]) + (", ..." if len(missing) > 3 else "")
        reuse = "".join(f" --reuse {member.store}" for member in cache.members)
        options = {"data": data.data, "split": data.split, "limit": data.limit, **known}
        shown = (f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)
        command = f"todi capture --teacher ... {' '.join(shown)}"
        raise CacheIncompleteError(
            f"{cache.root} lacks {len(missing):,} of the {len(examples):,} examples of {data.data}: {names}; append "
            f"them with `{command} --out {cache.members[0].store}`, or make a new cache of all examples with "
            f"`{command}{reuse} --out NEW`"
        )
    return select(cache, indices)
