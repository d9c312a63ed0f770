"""Where a cache lies: a folder, or what lies below a URL. Objects by key, each whole or not there.

base      what a store is, and how much is ever read of an object
locks     who writes to it
local     a folder
remote    a URL, through fsspec
staging   local copies of what lies at a URL
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

    `staging` is where copies of a URL's objects are kept; a folder needs none.

    Raises:
        ConfigError: what a URL's protocol needs is not installed; or a URL has lost a slash, as in a `Path`.
    """
    if isinstance(place, Store):
        return place
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", str(place)):
        raise ConfigError(f"{place} is no folder, and a URL has two slashes; give it as a string, not as a Path")
    protocol, separator, rest = str(place).partition("://")
    if not separator or protocol in ("file", "local"):
        return LocalStore(Path(rest or place).expanduser())
    from todi_offline.cache.store.remote import RemoteStore

    return RemoteStore(str(place), staging=staging)
