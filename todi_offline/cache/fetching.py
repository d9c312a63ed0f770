"""Many tasks on the objects of a store in, their results out; an object store answers slowly, so many run at once."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from todi_offline.cache.store import LocalStore, Store
from todi_offline.errors import CacheError

_REQUESTS = 16  # threads; each waits for a store
_AHEAD = 2  # shards

T = TypeVar("T")
R = TypeVar("R")


def streamed(function: Callable[..., R], *arguments: Iterable[Any]) -> Iterator[R]:
    """Yield the results of a function, as `map` does; the calls run in threads, and all begin with the first result."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        yield from pool.map(function, *arguments)


def at_once(function: Callable[..., R], *arguments: Iterable[Any]) -> list[R]:
    """Return the results of a function: those of `streamed`, as a list."""
    return list(streamed(function, *arguments))


def for_each(store: Store, function: Callable[..., R], *arguments: Iterable[Any]) -> list[R]:
    """Return the results of a function, as `map` does: at once in an object store, one after the other in a folder."""
    return list(map(function, *arguments)) if isinstance(store, LocalStore) else at_once(function, *arguments)


def ahead(stores: Sequence[Store], function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of a function, as `map` does; while the caller uses one, threads work on the next two.

    Folders need no fetching: if all stores are folders, no thread is started.
    """
    if all(isinstance(store, LocalStore) for store in stores):
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def fetch(store: Store, keys: Iterable[str]) -> None:
    """Make local copies of objects, many at once. An error is dropped: reading the object raises it again."""
    for_each(store, partial(_prepare, store), keys)


def _prepare(store: Store, key: str) -> None:
    with contextlib.suppress(CacheError):
        store.prepare(key)
