"""A purpose in, the folder of this user's cache for it out."""

import os
from pathlib import Path


def user_cache(*parts: str) -> Path:
    """Return a path below `$XDG_CACHE_HOME/todi_offline`; without the variable, below ~/.cache/todi_offline."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").joinpath("todi_offline", *parts)
