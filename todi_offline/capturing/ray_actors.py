"""Attempts at shards in, results out: actors of Ray capture, each with its own teacher; this process needs none.

An actor has two shards at a time: its teacher reads one while the other is written. An actor that dies is replaced, and
`attempts` says what becomes of its shards.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from todi_offline.cache.format.fingerprint import differences
from todi_offline.cache.shard_writer import ShardWriter
from todi_offline.capturing.attempts import Attempt, Attempts
from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import Engine, TeacherDescription
from todi_offline.capturing.loading import load_engine
from todi_offline.capturing.meter import Report
from todi_offline.capturing.work import ShardResult, ShardTask, ShardWorker, Work
from todi_offline.errors import CacheMismatchError, ConfigError, TodiError, first_line

logger = logging.getLogger(__name__)

_IN_FLIGHT = 2  # shards of an actor: one is read while the other is written
_POLL_SECONDS = 1.0
_KILL_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0
_OBJECT_STORE_BYTES = 2**29  # of a cluster that is started here: it holds the tasks in flight, of a megabyte each


class CaptureActor:
    """What runs in the process of an actor."""

    def __init__(self, name: str, config: CaptureConfig) -> None:
        """Load nothing yet: an error of ours that is raised here would not reach the driver."""
        self._name, self._config = f"{name} on {socket.gethostname()}", config
        self._engine: Engine | None = None
        self._worker: ShardWorker | None = None
        self._teacher = threading.Lock()
        self._num_tokens: Counter[int] = Counter()

    def load(self) -> TeacherDescription:
        """Load the engine and describe its teacher."""
        self._engine = load_engine(self._config)
        return self._engine.describe()

    def capture(self, writer: ShardWriter, task: ShardTask, left_out: Mapping[int, str]) -> ShardResult:
        """Capture a shard without some of its examples; while it is written, another thread captures the next."""
        with self._teacher:
            worker = self._start(writer)
            rows = worker.rows(task, lambda num_tokens: self._num_tokens.update({task.shard: num_tokens}), left_out)
        result = worker.commit(rows)
        self._num_tokens.pop(task.shard, None)
        return result

    def read(self, writer: ShardWriter, task: ShardTask, number: int) -> None:
        """Read one example of a shard, to see whether this process survives it; an error is left to `capture`."""
        with self._teacher, contextlib.suppress(Exception):
            self._start(writer).read(task, number)

    def num_tokens(self) -> int:
        """Return how many tokens were done of the shards that are not committed yet."""
        return sum(dict(self._num_tokens).values())

    def _start(self, writer: ShardWriter) -> ShardWorker:
        if self._worker is None:
            assert self._engine is not None, "an actor is loaded first"
            self._worker = ShardWorker.start(
                self._name, self._engine, writer, self._config.reuse, skip_failed=self._config.skip_failed
            )
        return self._worker


@dataclass(eq=False, slots=True)
class _Actor:
    """An actor as the driver sees it."""

    name: str
    handle: Any
    is_loaded: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    num_tokens: int = 0
    """Done of shards that are not committed, when it was last asked."""

    @property
    def has_room(self) -> bool:
        """Whether it may be given another shard."""
        return len(self.attempts) < _IN_FLIGHT and not any(attempt.is_alone for attempt in self.attempts)


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    """What an actor was asked to do."""

    kind: str
    actor: _Actor
    attempt: Attempt | None = None


class RayActors:
    """Workers that are actors of Ray."""

    def __init__(self, config: CaptureConfig) -> None:
        """Take the settings; entering the context starts the actors."""
        self._config, self._ray = config, _import_ray()
        self._closing = contextlib.ExitStack()
        self._actors: set[_Actor] = set()
        self._calls: dict[Any, _Call] = {}
        self._numbers = itertools.count()
        self._described: TeacherDescription | None = None
        self._failed_starts = 0
        self._polled = 0.0

    def __enter__(self) -> "RayActors":
        """Connect to the cluster, or start one, and start the actors."""
        self._closing.enter_context(_cluster(self._ray, self._config))
        self._closing.callback(self._kill_actors)
        for _ in range(self._config.ray.ray_actors):
            self._start_actor()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the actors, and the cluster that was started here."""
        self._closing.__exit__(kind, error, trace)

    def describe(self) -> TeacherDescription:
        """Return what the first actor that is ready says of its teacher; see `Workers`."""
        since, is_warned = time.monotonic(), False
        while self._described is None:
            for call, value in self._finished():
                self._note_loaded(call.actor, value)
            if not is_warned and time.monotonic() - since > _PATIENCE_SECONDS:
                is_warned = True
                logger.warning(
                    "no actor has started yet; each asks for %s, and the cluster has %s free",
                    _resources(self._config),
                    self._ray.available_resources(),
                )
        return self._described

    def capture(self, writer: ShardWriter, attempts: Attempts, report: Report) -> Iterator[ShardResult]:
        """Yield the result of each shard once it is committed; see `Workers`."""
        stored = self._ray.put(writer)
        told = _Told(report)
        try:
            while self._assign(attempts, stored):
                for call, value in self._finished():
                    result = self._outcome(call, value, attempts, stored, writer)
                    if result is not None:
                        told.committed(result.record.num_tokens)
                        yield result
                told.update(sum(actor.num_tokens for actor in self._actors))
        except BaseException:
            self._kill_actors()  # before the lock is given up
            raise

    def _assign(self, attempts: Attempts, writer: Any) -> bool:
        """Give actors work, the idle ones first; return whether any work is under way or left."""
        free = [actor for actor in self._actors if actor.is_loaded and actor.has_room]  # few of many
        for actor in sorted(free, key=lambda actor: len(actor.attempts)):
            while actor.has_room:
                attempt = attempts.next(is_idle=not actor.attempts)
                if attempt is None:
                    break
                if isinstance(attempt.task, ShardTask):  # from now on it lies in the cluster
                    attempt.task = self._ray.put(attempt.task)
                actor.attempts.append(attempt)
                self._go_on(actor, attempt, writer)
        return attempts.is_any_left or any(actor.attempts for actor in self._actors)

    def _go_on(self, actor: _Actor, attempt: Attempt, writer: Any) -> None:
        number = attempt.begin_next()
        if number is None:
            self._call("capture", actor, attempt, writer, attempt.task, attempt.left_out)
        else:
            self._call("read", actor, attempt, writer, attempt.task, number)

    def _outcome(
        self, call: _Call, value: Any, attempts: Attempts, stored: Any, writer: ShardWriter
    ) -> ShardResult | None:
        """Draw the conclusions from what a call has returned; return the result of a shard that is committed."""
        actor, attempt = call.actor, call.attempt
        if isinstance(value, _Death):
            return None if attempt is None else self._bury(attempt, actor, value, attempts, writer)
        if call.kind == "load":
            self._note_loaded(actor, value)
        elif call.kind == "num_tokens":
            actor.num_tokens = value
        elif call.kind == "read":
            assert attempt is not None, "an example belongs to a shard"
            self._go_on(actor, attempt, stored)
        else:
            assert attempt is not None, "what is captured is a shard"
            actor.attempts.remove(attempt)
            actor.num_tokens = max(0, actor.num_tokens - value.record.num_tokens)
            return value  # type: ignore[no-any-return]
        return None

    def _bury(
        self, attempt: Attempt, actor: _Actor, death: "_Death", attempts: Attempts, writer: ShardWriter
    ) -> ShardResult | None:
        """Plan a shard of a dead actor anew, unless the actor committed it before it died."""
        actor.attempts.remove(attempt)
        record = writer.committed(attempt.shard)
        if record is not None:
            return ShardResult(record, Work(num_shards=1), actor.name)
        attempts.died(attempt, death.reason)
        return None

    def _finished(self) -> Iterator[tuple[_Call, Any]]:
        """Yield the calls that have ended since the last time, each with its value or with the death of its actor."""
        self._poll()
        refs = list(self._calls)
        ready, left = self._ray.wait(refs, num_returns=1, timeout=_POLL_SECONDS)
        more, _ = self._ray.wait(left, num_returns=len(left), timeout=0) if ready and left else ([], [])
        for ref in (*ready, *more):
            call = self._calls.pop(ref)
            yield call, self._value(ref, call.actor)

    def _value(self, ref: Any, actor: _Actor) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except exceptions.RayError as error:
            return self._note_death(actor, _Death(first_line(error)))

    def _note_death(self, actor: _Actor, death: "_Death") -> "_Death":
        """Replace an actor, once.

        Raises:
            TodiError: one actor after the other has died before its teacher was loaded.
        """
        if actor in self._actors:
            self._actors.remove(actor)
            self._ray.kill(actor.handle)  # it may only be out of reach
            self._failed_starts += not actor.is_loaded
            if self._failed_starts >= self._config.ray.ray_attempts:
                raise TodiError(
                    f"{self._failed_starts} actors have died while they loaded the teacher: {death.reason}; committed "
                    "work is safe. Make sure that the teacher fits into the memory of an actor"
                )
            self._start_actor()
        return death

    def _note_loaded(self, actor: _Actor, described: "TeacherDescription | _Death") -> None:
        """Let an actor work whose teacher is that of the others.

        Raises:
            CacheMismatchError: it is another one, or other libraries run it.
        """
        if isinstance(described, _Death):
            return
        self._failed_starts, actor.is_loaded = 0, True
        self._described = self._described or described
        mine, first = dataclasses.asdict(described), dataclasses.asdict(self._described)
        lines = differences(mine, first, (f"in {actor.name}", "in the first actor"))
        if lines:
            raise CacheMismatchError(f"the actors differ: {'; '.join(lines)}; install the same libraries on every node")

    def _start_actor(self) -> None:
        name = f"actor {next(self._numbers)}"
        remote = self._ray.remote(CaptureActor).options(max_concurrency=_IN_FLIGHT + 1, **_resources(self._config))
        actor = _Actor(name, remote.remote(name, self._config))
        self._actors.add(actor)
        self._call("load", actor, None)

    def _call(self, kind: str, actor: _Actor, attempt: Attempt | None, *args: Any) -> None:
        self._calls[getattr(actor.handle, kind).remote(*args)] = _Call(kind, actor, attempt)

    def _poll(self) -> None:
        """Ask busy actors now and then how far they are."""
        if time.monotonic() - self._polled < max(_POLL_SECONDS, len(self._actors) / 100):
            return
        self._polled = time.monotonic()
        asked = {call.actor for call in self._calls.values() if call.kind == "num_tokens"}
        for actor in self._actors:
            if actor.attempts and actor not in asked:
                self._call("num_tokens", actor, None)

    def _kill_actors(self) -> None:
        """End all actors, and wait until what they were doing has ended."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if self._calls:
            self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=_KILL_SECONDS)
        self._actors.clear()
        self._calls.clear()


@dataclass(frozen=True, slots=True)
class _Death:
    """The end of an actor, in place of what it was to return."""

    reason: str


class _Told:
    """Turns how much is done in all into what was done since the last time."""

    def __init__(self, report: Report) -> None:
        self._report, self._committed, self._told = report, 0, 0

    def committed(self, num_tokens: int) -> None:
        self._committed += num_tokens
        self._report(0, 1)

    def update(self, not_committed: int) -> None:
        done = self._committed + not_committed
        self._report(done - self._told, 0)
        self._told = done


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray-actors needs Ray: pip install 'todi-offline[ray]'") from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, config: CaptureConfig) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; what was started or connected here ends with the context.

    Raises:
        ConfigError: there is no such cluster, or this machine has fewer GPUs than an actor asks for.
    """
    if ray.is_initialized():
        yield
        return
    wanted = config.ray
    here = {"num_cpus": wanted.ray_actors * max(1, round(wanted.ray_cpus)), "include_dashboard": False}
    here |= {"object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(wanted.ray_address, log_to_driver=False, logging_level="ERROR", **({} if wanted.ray_address else here))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no cluster of Ray answers at {wanted.ray_address}: {first_line(error)}; start one with `ray start "
            "--head`, or leave out --ray-address to use this machine alone"
        ) from error
    try:
        if not wanted.ray_address and ray.cluster_resources().get("GPU", 0) < wanted.ray_gpus:
            raise ConfigError(
                f"an actor asks for {wanted.ray_gpus:g} GPUs, and this machine has "
                f"{ray.cluster_resources().get('GPU', 0):g}; lower --ray-gpus, or name a cluster with --ray-address"
            )
        yield
    finally:
        ray.shutdown()


def _resources(config: CaptureConfig) -> dict[str, float]:
    return {"num_cpus": config.ray.ray_cpus, "num_gpus": config.ray.ray_gpus}
