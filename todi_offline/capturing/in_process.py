"""Attempts at shards in, results out: this process captures them, and writes each while the teacher reads the next."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.attempts import Attempt, Attempts
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import TeacherDescription
from todi_offline.capturing.loading import load_engine
from todi_offline.capturing.meter import Report
from todi_offline.capturing.work import ShardResult, ShardRows, ShardWorker
from todi_offline.teacher.in_transformers import Teacher


class InProcess:
    """One worker: this process, with its engine."""

    def __init__(self, config: CaptureConfig, name: str, teacher: Teacher | None, *, commits: bool = True) -> None:
        """Load the engine; its teacher may be loaded already.

        Without `commits`, this process holds a part of the teacher, and another process commits the shards.

        Raises:
            ModelError: the teacher cannot be loaded.
        """
        self._name, self._config, self._commits = name, config, commits
        self._engine = load_engine(config, teacher)

    def describe(self) -> TeacherDescription:
        """Return what a cache records of the teacher; see `Workers`."""
        return self._engine.describe()

    def capture(self, writer: ShardWriter, attempts: Attempts, report: Report) -> Iterator[ShardResult]:
        """Yield the result of each shard once it is committed; see `Workers`."""
        worker = ShardWorker.start(
            self._name, self._engine, writer, self._config.reuse, skip_failed=self._config.skip_failed
        )
        if not self._commits:
            while (attempt := attempts.next(is_idle=True)) is not None:
                worker.rows(attempt.task, lambda _: None)
            return
        for result in _each_behind_the_next(worker, attempts, report):
            report(0, 1)
            yield result

    def __enter__(self) -> "InProcess":
        """Do nothing more: the engine is loaded."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of what the engine holds."""
        self._engine.close()


def _each_behind_the_next(worker: ShardWorker, attempts: Attempts, report: Report) -> Iterator[ShardResult]:
    def commit(attempt: Attempt, rows: ShardRows) -> ShardResult:
        result = worker.commit(rows)
        attempts.committed(attempt)
        return result

    with ThreadPoolExecutor(1) as background:
        writing: Future[ShardResult] | None = None
        while (attempt := attempts.next(is_idle=True)) is not None:
            if attempt.is_alone and writing is not None:
                yield writing.result()
                writing = None
            while (number := attempts.begin(attempt)) is not None:
                worker.read(attempt.task, number)
            rows = worker.rows(attempt.task, lambda num_tokens: report(num_tokens, 0), attempt.left_out)
            if writing is not None:
                yield writing.result()
            writing = background.submit(commit, attempt, rows)
        if writing is not None:
            yield writing.result()
