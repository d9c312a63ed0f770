"""Tokens and shards as they are done in, how far the capture is out."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

Report = Callable[[int, int], None]
"""Called with the tokens and the shards that were done since it was called last."""


@dataclass(frozen=True, slots=True)
class CaptureProgress:
    """How far a capture is, all its workers together."""

    num_tokens: int
    """Captured or copied so far, those of earlier runs included."""
    total_tokens: int
    num_shards: int
    """Committed so far, those of earlier runs included."""
    total_shards: int


Progress = Callable[[CaptureProgress], None]


class Meter:
    """Adds up what workers report, from whichever thread."""

    def __init__(self, begun: CaptureProgress, progress: Progress | None) -> None:
        """Tell how far the capture was before."""
        self._begun, self._progress = begun, progress
        self._num_tokens = self._num_shards = 0
        self._lock = threading.Lock()
        self.add(0, 0)

    def add(self, num_tokens: int, num_shards: int) -> None:
        """Count what was done since the last call."""
        with self._lock:
            self._num_tokens, self._num_shards = self._num_tokens + num_tokens, self._num_shards + num_shards
            self._tell()

    def set(self, num_tokens: int, num_shards: int) -> None:
        """Say what was done by all workers since the capture began."""
        with self._lock:
            self._num_tokens, self._num_shards = num_tokens, num_shards
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            begun = self._begun
            done = replace(
                begun,
                num_tokens=min(begun.num_tokens + self._num_tokens, begun.total_tokens),
                num_shards=begun.num_shards + self._num_shards,
            )
            self._progress(done)
