"""A place in, a store out: a folder or a URL with objects by key, each whole or missing.

base      the protocol of a store, and the most that is read of an object
locks     one writing process at a time
local     a folder
remote    a URL, through fsspec
staging   local copies of the objects of a URL
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from todi_offline.cache.store.base import Store
from todi_offline.cache.store.local import LocalStore
from todi_offline.errors import ConfigError

if TYPE_CHECKING:
    from todi_offline.cache.store.staging import Staging

__all__ = ["LocalStore", "Store", "open_store"]


def open_store(place: "str | Path | Store", staging: "Staging | None" = None) -> Store:
    """Return the store at a place: a folder, or a URL such as `s3://bucket/prefix`.

    `staging` keeps local copies of the objects of a URL; a folder needs none.

    Raises:
        ConfigError: the package for the protocol of a URL is not installed; or a URL has lost a slash, as in a `Path`.
    """
    if isinstance(place, Store):
        return place
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", str(place)):
        raise ConfigError(f"{place} looks like a URL with one slash; give the URL as a string, not as a Path")
    protocol, separator, rest = str(place).partition("://")
    if not separator or protocol in ("file", "local"):
        return LocalStore(Path(rest or place).expanduser())
    from todi_offline.cache.store.remote import RemoteStore

    return RemoteStore(str(place), staging=staging)
