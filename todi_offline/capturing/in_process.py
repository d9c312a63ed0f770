"""Tasks in, results out: shards captured by this process, each written while the teacher reads the next."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from todi_offline.capturing.work import ShardResult, ShardTask, ShardWorker


def capture_in_process(
    worker: ShardWorker, tasks: Iterable[ShardTask], report: Callable[[int], None]
) -> Iterator[ShardResult]:
    """Yield the result of each shard once it is committed."""
    with ThreadPoolExecutor(1) as background:
        writing: Future[ShardResult] | None = None
        for task in tasks:
            rows = worker.rows(task, report)
            if writing is not None:
                yield writing.result()
            writing = background.submit(worker.commit, rows)
        if writing is not None:
            yield writing.result()
