"""The processes that torchrun or `accelerate launch` starts: each runs the same command, and rank 0 coordinates.

Whatever one rank raises as an error of ours is raised on all of them: no rank waits for one that has given up.
"""

import contextlib
import datetime
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from todi_offline.cache.format.fingerprint import differences
from todi_offline.capturing.meter import Meter, Report
from todi_offline.errors import CacheMismatchError, ConfigError, ModelError, TodiError, first_line

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=100)  # a rank that has done its shards waits for the slowest one
_START = datetime.timedelta(minutes=30)
_POLL_SECONDS = 0.5
_MEET_SECONDS = 0.005
_STEP = datetime.timedelta(minutes=10)  # a layer of a teacher that is split over ranks
_TOKENS, _SHARDS, _FAILED, _BEGUN = "tokens", "shards", "failed", "begun"  # keys of the board


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a capture, and which of them this one is."""

    rank: int = 0
    size: int = 1
    group: Any = None
    board: Any = None
    """Counters that all ranks add to and read at any time, in between what they do together."""
    is_one_worker: bool = False
    """Whether all ranks work on each shard together, each with a part of the teacher; then rank 0 alone commits."""

    @property
    def name(self) -> str:
        """This process, for people."""
        return f"rank {self.rank} on {socket.gethostname()}" if self.size > 1 else "this process"

    def first(self, make: Callable[[], T]) -> T:
        """Return on every rank what rank 0 makes."""
        made: list[Any] = [None]
        if self.rank == 0:
            made[0] = _attempt(make)
        if self.size > 1:
            with _lost_ranks():
                dist.broadcast_object_list(made, src=0, group=self.group)
        return _result(made[0])  # type: ignore[no-any-return]

    def together(self, make: Callable[[], T]) -> T:
        """Return what this rank makes, once all ranks have made theirs."""
        made = _attempt(make)
        failed = made if isinstance(made, TodiError) else None
        if failed is not None and self.board is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone, as `gather` finds out
                self.board.set(_FAILED, "")
        for error in self.gather(failed):
            _result(error)
        return made  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _lost_ranks():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def node_by_node(self, make: Callable[[], T]) -> T:
        """Let the first rank of every node make something, then the others, who find what it has left on the disk."""
        is_first = self.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        made = self.together(lambda: make() if is_first else None)
        return self.together(lambda: make() if made is None else made)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Refuse ranks that work on other data or with another teacher or libraries than rank 0.

        Raises:
            CacheMismatchError: with all that differs, side by side.
        """
        expected = self.first(lambda: facts)
        found = differences(expected, facts, ("on rank 0", f"on rank {self.rank}"))
        lines = [line for lines in self.gather(found) for line in lines]
        if lines:
            raise CacheMismatchError(
                f"the ranks do not work on the same capture: {'; '.join(lines)}; start all of them with one command"
            )

    @property
    def commits(self) -> bool:
        """Whether this rank commits the shards that it captures."""
        return self.rank == 0 or not self.is_one_worker

    def share(self, items: Sequence[T]) -> Iterator[T]:
        """Yield this rank's share, each when it is asked for, until another rank fails.

        Ranks that are one worker get all items, each item once all ranks ask for it: a rank that has failed would not
        join the others in the teacher's collectives.
        """
        share = items if self.is_one_worker else items[self.rank :: self.size]
        for number, item in enumerate(share):
            if self.is_one_worker:
                self._meet(f"{_BEGUN} {number}")
            if self._has_failed():
                return
            yield item

    def before_sigterm(self, farewell: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Within, a rank that gets SIGTERM calls `farewell` before it ends; a process by itself handles its signals."""
        return _farewell(farewell) if self.size > 1 else contextlib.nullcontext()

    def _meet(self, name: str) -> None:
        """Return when all ranks have come here, or one has failed."""
        with _lost_ranks():
            self.board.add(name, 1)
            while self.board.add(name, 0) < self.size and not self.board.check([_FAILED]):
                time.sleep(_MEET_SECONDS)

    def _has_failed(self) -> bool:
        """Whether a rank has raised an error."""
        with _lost_ranks():
            return self.board is not None and bool(self.board.check([_FAILED]))

    @contextlib.contextmanager
    def metered(self, meter: Meter) -> Iterator[Report]:
        """Yield what reports the work of this rank; the meter of rank 0 shows that of all ranks."""
        if self.board is None:
            yield meter.add
        elif self.rank:
            yield self._add
        else:
            with _polling(lambda: meter.set(self.board.add(_TOKENS, 0), self.board.add(_SHARDS, 0))):
                yield self._add

    def _add(self, num_tokens: int, num_shards: int) -> None:
        with _lost_ranks():
            for key, number in ((_TOKENS, num_tokens), (_SHARDS, num_shards)):
                if number:
                    self.board.add(key, number)


@contextlib.contextmanager
def one_rank_speaks() -> Iterator[bool]:
    """Yield whether this process is to print: rank 0, or a process that no launcher has started.

    An error of ours ends any other rank without a word: it is raised on rank 0, too.
    """
    if not _is_launched() or os.environ["RANK"] == "0":
        yield True
        return
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield False
    except TodiError:
        sys.exit(1)


@contextlib.contextmanager
def join_ranks(device: str, tp: int = 1) -> Iterator[Ranks]:
    """Yield the ranks that this process is one of: all of a job of torchrun or accelerate, else itself alone.

    With `tp` above 1, the teacher is split over so many ranks.

    Raises:
        ModelError: a node has fewer devices than ranks.
        ConfigError: the job has another number of ranks than `tp`.
    """
    if not dist.is_initialized() and not _is_launched():
        _require_size(tp, 1)
        yield Ranks()
        return
    _take_device(device)
    with _default_sigterm(), _group(is_split=tp > 1) as group:
        rank, size = dist.get_rank(), dist.get_world_size()
        _require_size(tp, size)
        yield Ranks(rank, size, group, _board(rank, group), is_one_worker=tp > 1)


def _require_size(tp: int, size: int) -> None:
    """Refuse a teacher that is to be split over another number of ranks than there are."""
    if tp not in (1, size):
        raise ConfigError(
            f"tp is {tp}, and this job has {size} rank{'s' * (size > 1)}; start it with `torchrun --nproc-per-node "
            f"{tp} -m todi_offline capture --tp {tp} ...`; for several copies of a split teacher, "
            "use actors of Ray with --engine vllm"
        )


def _is_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def _take_device(device: str) -> None:
    """Make the device of this rank the one that `auto` means."""
    if device != "auto" or not torch.accelerator.is_available():
        return
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if local_rank >= count:
        raise ModelError(
            f"local rank {local_rank} has no device: this node shows {count} to its processes; start as many processes "
            "as there are devices"
        )
    torch.accelerator.set_device_index(local_rank)


@contextlib.contextmanager
def _default_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process at once: a handler of Python's would wait until a collective returns."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _farewell(farewell: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM has another thread call a function and end this process, whatever the main thread waits for."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        while number := receiver.recv(1):
            if number[0] == signal.SIGTERM:
                try:
                    farewell()
                finally:
                    os._exit(128 + signal.SIGTERM)

    thread = threading.Thread(target=watch, name="todi_offline SIGTERM", daemon=True)
    thread.start()
    # Set first and reset last: while the handler stands, Python writes the signal to the socket, and none is lost.
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(descriptor)
        sender.close()
        thread.join()
        receiver.close()


@contextlib.contextmanager
def _group(*, is_split: bool) -> Iterator[Any]:
    """Yield a group of all ranks that waits for as long as a capture takes.

    A teacher that is split over the ranks has the default group for itself, on the backend of its device and with the
    patience of a single step.
    """
    if dist.is_initialized():
        yield dist.new_group(backend="gloo", timeout=_PATIENCE)
        return
    with _lost_ranks():
        store, rank, size = next(rendezvous("env://", timeout=_START))
        # Ranks that torchrun has started again would find what the dead ones wrote: addresses where nobody answers.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if is_split and torch.cuda.is_available() else "gloo"
        patience = _STEP if is_split else _PATIENCE
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    try:
        yield dist.new_group(backend="gloo", timeout=_PATIENCE) if is_split else None
    finally:
        dist.destroy_process_group()


def _board(rank: int, group: Any) -> Any:
    """Return a store of rank 0's own, which all ranks may use while others are busy."""
    address: list[Any] = [None]
    board = None
    if rank == 0:
        own = _own_address()
        board = TCPStore(own, 0, is_master=True, wait_for_workers=False, timeout=_START)
        address[0] = own, board.port
    with _lost_ranks():
        dist.broadcast_object_list(address, src=0, group=group)
        if board is None:
            host, port = address[0]
            board = TCPStore(host, port, is_master=False, timeout=_START)
    return board


def _own_address() -> str:
    """Return an address at which the other ranks reach this one, which need not be on the master's node."""
    master = os.environ.get("MASTER_ADDR", socket.gethostname())
    try:
        family, _, _, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(place)  # sends nothing, and says by which interface it would
            own = str(way.getsockname()[0])
        return master if ipaddress.ip_address(own).is_loopback else own
    except (OSError, ValueError):
        return master


@contextlib.contextmanager
def _polling(poll: Callable[[], None]) -> Iterator[None]:
    """Within, and once more at the end, call a function every now and then."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_POLL_SECONDS):
            poll()

    thread = threading.Thread(target=run, name="todi_offline progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    poll()


@contextlib.contextmanager
def _lost_ranks() -> Iterator[None]:
    """Within, the end of another rank is an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise TodiError(
            f"another process of this job has ended or cannot be reached: {first_line(error)}; committed work is "
            "safe: run the same command again"
        ) from error


def _attempt(make: Callable[[], T]) -> T | TodiError:
    try:
        return make()
    except TodiError as error:
        return error


def _result(outcome: Any) -> Any:
    if isinstance(outcome, TodiError):
        raise outcome
    return outcome
