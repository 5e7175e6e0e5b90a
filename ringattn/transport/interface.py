"""The transport interface: what the library calls, beside what users call on a `Ring`.

A transport moves bytes and knows no attention. Blocks travel to the right neighbour (``rank + 1``) and come from the
left one, or the other way. Everything else is built on `Transport.exchange`, one round in which every rank learns the
bytes of all others.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from ..errors import RingError
from ..native.cuda import Kind
from ..tracing.spans import Tracer
from .base import Ring
from .shared_input import SharedInput

Buffers = Sequence[memoryview]  # flat, contiguous, of bytes


class DeviceBuffer(NamedTuple):
    """Bytes on this rank's GPU, and the array that they belong to, which lives as long as this does."""

    address: int
    nbytes: int
    owner: Any


# Gives the buffers of a message, memoryviews or `DeviceBuffer`s, when it starts.
Load = Callable[[], Sequence[Any]]


class Signal:
    """An event that a transfer can be made to wait for: closed at first, opened once.

    Attributes:
        awaited: Whether a transfer waits for it, or did.
    """

    def __init__(self) -> None:
        self.awaited = False
        self._done = False
        self._watchers: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        return self._done

    def open(self) -> None:
        self._done = True
        for watcher in self._watchers:
            watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` when this opens, so that a transport need not poll it."""
        self._watchers.append(watcher)


class Transfer(abc.ABC):
    """A message under way. It starts when everything that it waits for is done."""

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether the whole message has left (send) or arrived (recv)."""


class GpuMemory(Protocol):
    """Memory of a rank's GPU, as links need it; `native.cuda.Driver` is one."""

    def locate(self, arrays: Sequence[mx.array]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Find the addresses of contiguous arrays; see `native.cuda.Driver.locate`."""

    def allocate(self, kinds: Sequence[Kind]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Make arrays of arbitrary numbers, and find their addresses; see `native.cuda.Driver.allocate`."""

    def pack(self, arrays: Sequence[mx.array], axes: Sequence[int], room: int) -> list[mx.array]:
        """Copy arrays to new ones, whose first axis is the tokens; see `native.cuda.Driver.pack`."""


class Links(Protocol):
    """Links between the GPUs of a ring's ranks, beside its transport."""

    @property
    def gpu(self) -> GpuMemory:
        """The GPU of this rank."""

    def send(
        self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1, late: bool = False
    ) -> Transfer:
        """Send the `DeviceBuffer`s that `load` returns. See `Transport.send`. It starts in `advance`.

        With `late`, `load` reads what the messages in `after` bring, so that these must have arrived before.
        """

    def recv(self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        """Receive into the `DeviceBuffer`s that `load` returns. See `Transport.recv`. It starts in `advance`."""

    def advance(self) -> None:
        """Finish and start messages."""

    def forget(self) -> None:
        """Drop the messages that have not started."""


class Transport(Ring):
    """A ring with the methods by which the library moves bytes and reports failures.

    Attributes:
        in_graph_bytes: Bytes that the payload of an `exchange_in_graph` may have; 0 where the transport has none.
        shared_input: An input that must be the same on all ranks in every call, besides its arguments.
        has_gpus: Whether blocks can travel from GPU to GPU, by `connect_gpus`; the same on all ranks.
        finish_trace: Writes the files of the trace, if there is one. Collective; `close` calls it first.
    """

    in_graph_bytes: int = 0
    has_gpus: bool = False
    shared_input: SharedInput | None = None

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self.finish_trace: Callable[[], None] = lambda: None

    @property
    def tracer(self) -> Tracer:
        """The recorder of this rank's spans, or one that records nothing."""
        return self._tracer

    @tracer.setter
    def tracer(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @property
    def neighbours_on_other_hosts(self) -> bool:
        """Whether both neighbours of every rank are on other hosts and can be reached at once."""
        pairs = zip(self.hosts, (*self.hosts[1:], *self.hosts[:1]))
        return self.size > 2 and self.duplex and all(host != other for host, other in pairs)

    @abc.abstractmethod
    def split(self, color: int | None) -> Transport | None:
        """See `Ring.split`."""

    def guard_uninterruptible_calls(self) -> None:  # noqa: B027  (a ring of one rank has no peer that could die)
        """End the process, with the cause, when the ring breaks and the main thread does not notice.

        For programs in which the main thread waits for other ranks where this ring cannot interrupt it.
        """

    @abc.abstractmethod
    def exchange(self, payload: Buffers) -> list[memoryview]:
        """Give every rank this rank's bytes and return those of all ranks, in rank order, in one message round.

        Lengths may differ from rank to rank, and no rank needs to know another's beforehand.
        """

    def exchange_in_graph(self, payload: mx.array, check: Callable[[list[memoryview]], object]) -> mx.array:
        """Do an `exchange` as a node of MLX's graph, which runs when the graph is evaluated.

        Args:
            payload: Bytes, uint8, of the same number on every rank, at most `in_graph_bytes`.
            check: `check_pending` calls it with the first bytes of every rank's payload; it may raise.

        Returns:
            The bytes of all ranks, as rows; zeros for what a rank did not send.
        """
        raise NotImplementedError

    def check_pending(self, keep: int = 0) -> None:  # noqa: B027  (a transport without graph exchanges has none pending)
        """Evaluate all but the last `keep` lazy exchanges; raise their errors."""

    @abc.abstractmethod
    def send(
        self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1
    ) -> Transfer:
        """Send the buffers that `load` returns to the right neighbour once all of `after` are done.

        With a `step` of -1, which takes three ranks and a `duplex` ring, send to the left one.

        `load` is called once, when the message starts, and perhaps on another thread: it may touch memoryviews and
        NumPy arrays, but no MLX array. The transfer keeps the buffers alive until it is done.
        `tag` distinguishes the messages of one call: the same number names the same message on both sides.
        """

    @abc.abstractmethod
    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        """Receive from the left neighbour into `buffers`, of exactly the sizes that it sends.

        With a `step` of -1, receive from the right one.
        """

    @abc.abstractmethod
    def wait(self, *transfers: Transfer) -> None:
        """Return when all are done; raise `RingError` when the ring breaks first."""

    @property
    def links(self) -> Links | None:
        """The links between the GPUs of the ranks, once `connect_gpus` has made them."""
        return None

    def connect_gpus(self) -> Links:
        """Return the links between the GPUs of a ring with `has_gpus`. The first call is collective."""
        raise NotImplementedError

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """Report to every peer that this rank cannot go on because of `error`. The ring is broken afterwards."""

    def set_progress(self, what: str, hop: int) -> None:  # noqa: B027  (a ring of one rank has no peer to report to)
        """Record the current call and hop for error messages."""

    def call(self, what: str) -> Call:
        """Hold the ring for one collective call; a second one, from any thread, gets a `RingError`."""
        return Call(self, what)

    @contextmanager
    def sharing(self, shared: SharedInput) -> Iterator[None]:
        """Require that `shared` is the same on all ranks in every call."""
        before = self.shared_input
        self.shared_input = shared
        try:
            yield
        finally:
            self.shared_input = before

    @contextmanager
    def break_ring_on_error(self) -> Iterator[None]:
        """Break the ring on all ranks if an exception is raised here: peers already wait for this rank's messages."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.fail(error)
        self.close()


class Call:
    """The context manager of `Transport.call`. A plain class, because it is entered once per token and layer."""

    def __init__(self, ring: Transport, what: str):
        self._ring = ring
        self._what = what

    def __enter__(self) -> None:
        if not self._ring._busy.acquire(blocking=False):
            text = f"{self._what}: this ring is in use by another thread, and a ring runs one call at a time"
            raise RingError(text)
        self._ring.set_progress(self._what, 0)
        self._ring.tracer.begin(self._what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ring.tracer.end()
        if error is None:
            self._ring.set_progress(f"after {self._what}", 0)  # after an exception the place says where it happened
        self._ring._busy.release()


@dataclass(frozen=True)
class Direction:
    """One direction around a ring: messages come from the rank before and go to the next.

    Attributes:
        ring: The ring.
        step: 1 to the right, -1 to the left.
        links: The links between the GPUs, where blocks travel over these.
    """

    ring: Transport
    step: int
    links: Links | None = None

    def send(self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = (), late: bool = False) -> Transfer:
        """See `Transport.send`, and `Links.send` for `late`."""
        _await(after)
        if self.links is not None:
            return self.links.send(load, tag=tag, after=after, step=self.step, late=late)
        return self.ring.send(load, tag=tag, after=after, step=self.step)

    def recv(self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = ()) -> Transfer:
        """See `Transport.recv`. `load` returns the places of the bytes."""
        _await(after)
        if self.links is not None:
            return self.links.recv(load, tag=tag, after=after, step=self.step)
        return self.ring.recv(load(), tag=tag, after=after, step=self.step)


def _await(signals: Sequence[Transfer | Signal]) -> None:
    """Note that a transfer waits for these signals."""
    for one in signals:
        if isinstance(one, Signal):
            one.awaited = True
