"""What every transport gives the rest of the library.

A transport moves bytes and knows no attention. Blocks travel to the right neighbour (``rank + 1``) and come from the
left one, or the other way; everything else is built on `Ring.exchange`, one round in which every rank learns the bytes
of all others.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import ArgumentError, ArgumentTypeError, RingError
from .shared_input import SharedInput

Buffers = Sequence[memoryview]  # flat, contiguous, of bytes


class Event(NamedTuple):
    """One interval of a rank's timeline: `start` and `stop` in seconds of ``time.time()``."""

    kind: str  # "compute", "send", "recv" or "wait"
    hop: int
    start: float
    stop: float
    bytes: int = 0


class Gate:
    """Something a transfer can be told to come after: closed at first, opened once."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._watchers: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        return self._opened.is_set()

    def open(self) -> None:
        self._opened.set()
        for watcher in self._watchers:
            watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called when the gate opens, so that a transport need not poll it."""
        self._watchers.append(watcher)


class Transfer(abc.ABC):
    """A message under way. It starts when everything it comes after is done."""

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether the message has left (send) or arrived (recv) whole."""


class Ring(abc.ABC):
    """All ranks in order, each with a left and a right neighbour. A context manager: leaving it closes the ring.

    Attributes:
        backend: The transport: ``"mpi"``, ``"mlx"`` or ``"solo"``.
        rank: This process's place, ``0 <= rank < size``.
        size: The number of ranks.
        hosts: The host name of every rank.
        timeout: Seconds without a sign of life after which a peer counts as dead.
        trace: A list that collects `Event`s while it is not ``None``.
        in_graph_bytes: How long the payload of an `exchange_in_graph` may be; 0 where there is none.
        duplex: Whether messages may come and go on all links at once.
        shared_input: What all ranks must have in common, besides its arguments, for a call to go on.
        bytes_sent: Bytes of blocks and states this rank has sent so far: those of `send`; `exchange` does not count.
    """

    backend: str
    rank: int
    size: int
    hosts: tuple[str, ...]
    timeout: float
    trace: list[Event] | None = None
    bytes_sent: int = 0
    in_graph_bytes: int = 0
    shared_input: SharedInput | None = None
    duplex: bool = True

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._both_ways: bool | None = None

    # What users call

    def __repr__(self) -> str:
        return f"Ring(backend={self.backend!r}, rank={self.rank}, size={self.size}, hosts={self.hosts!r})"

    @property
    def both_ways(self) -> bool | None:
        """Whether `ring_attention` halves blocks and sends one half to the right, one to the left: the same everywhere.

        A cable between neighbours carries both directions at once, so a hop's transfer takes half the time. ``None``,
        the default, is yes where there are three ranks or more, neighbours are on different hosts, blocks are long,
        and nothing has to travel further for it. The result may differ in its last bits: the order of the sums does.

        Raises:
            ArgumentError: When set to ``True`` where it cannot be: on fewer than three ranks, or over `jaccl`.
        """
        return self._both_ways

    @both_ways.setter
    def both_ways(self, value: bool | None) -> None:
        if not (value is None or isinstance(value, bool)):
            raise ArgumentTypeError(f"both_ways: {type(value).__name__}, expected True, False or None")
        if value and self.size < 3:
            raise ArgumentError(f"both_ways: True, expected False or None on {self.size} ranks: there is but one link")
        if value and not self.duplex:
            raise ArgumentError("both_ways: True, expected False or None where a rank does one thing at a time")
        self._both_ways = value

    @property
    def apart(self) -> bool:
        """Whether both neighbours of every rank are on other hosts and can be reached at once."""
        pairs = zip(self.hosts, (*self.hosts[1:], *self.hosts[:1]))
        return self.size > 2 and self.duplex and all(host != other for host, other in pairs)

    @abc.abstractmethod
    def split(self, color: int | None) -> Ring | None:
        """The ring of the ranks that gave the same `color`, in the same order; ``None`` where `color` is ``None``."""

    @abc.abstractmethod
    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        """The `x` of rank `root`, on every rank. What the other ranks pass is not looked at and may be ``None``."""

    @abc.abstractmethod
    def all_reduce(self, x: mx.array) -> mx.array:
        """The sum of all ranks' `x` (same shape and dtype everywhere), the same bits on every rank and every run."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the ring; a peer that still waits for this rank gets a `RingError`. Closing twice does nothing."""

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.fail(error)
        self.close()

    # What the library calls

    @abc.abstractmethod
    def exchange(self, payload: Buffers) -> list[memoryview]:
        """Give every rank this rank's bytes and return those of all ranks, in rank order, in one message round.

        Lengths may differ from rank to rank, and no rank needs to know another's beforehand.
        """

    def exchange_in_graph(self, payload: mx.array, check: Callable[[list[memoryview]], object]) -> mx.array:
        """An `exchange` that is a node of MLX's graph and runs when that is evaluated.

        Args:
            payload: Bytes, uint8, of the same number on every rank, at most `in_graph_bytes`.
            check: Called by `settle` with how every rank's bytes begin; it may raise.

        Returns:
            The bytes of all ranks, as rows; zeros for what a rank did not send.
        """
        raise NotImplementedError

    def settle(self, keep: int = 0) -> None:  # noqa: B027  (where there is nothing in a graph, nothing is open)
        """See to it that all but the last `keep` exchanges in MLX's graph have run, and raise what is wrong in them."""

    @abc.abstractmethod
    def send(
        self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Gate] = (), step: int = 1
    ) -> Transfer:
        """Send the buffers that `load` returns to the right neighbour once all of `after` are done.

        With a `step` of -1, which takes three ranks and a `duplex` ring, to the left one.

        `load` is called once, when the message starts, and perhaps on another thread: it may touch memoryviews and
        NumPy arrays, nothing of MLX. The transfer keeps the buffers alive until it is done.
        `tag` tells the messages of one call apart: the same number names the same message on both sides.
        """

    @abc.abstractmethod
    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Gate] = (), step: int = 1) -> Transfer:
        """Receive from the left neighbour into `buffers`, of exactly the sizes that it sends.

        With a `step` of -1, what travels to the left: from the right one.
        """

    @abc.abstractmethod
    def wait(self, *transfers: Transfer) -> None:
        """Return when all are done; raise `RingError` when the ring breaks first."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell every peer that this rank cannot go on because of `error`. The ring is broken afterwards."""

    def at(self, what: str, hop: int) -> None:  # noqa: B027  (a transport that has nobody to tell needs nothing here)
        """Say where this rank is, for the error messages of others."""

    def call(self, what: str) -> Call:
        """Hold the ring for one collective call; a second one, from any thread, gets a `RingError`."""
        return Call(self, what)

    @contextmanager
    def sharing(self, shared: SharedInput) -> Iterator[None]:
        """Make `shared` a part of what ranks agree on in every call."""
        before = self.shared_input
        self.shared_input = shared
        try:
            yield
        finally:
            self.shared_input = before

    @contextmanager
    def committed(self) -> Iterator[None]:
        """The part of a call that peers already count on: an exception in it breaks the ring for all of them."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise


class Call:
    """What `Ring.call` returns: a context manager, and a plain class because it is entered once per token and layer."""

    def __init__(self, ring: Ring, what: str):
        self._ring, self._what = ring, what

    def __enter__(self) -> None:
        if not self._ring._busy.acquire(blocking=False):
            text = f"{self._what}: this ring is in use by another thread, and a ring runs one call at a time"
            raise RingError(text)
        self._ring.at(self._what, 0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self._ring.at(f"after {self._what}", 0)  # after an exception the place says where it happened
        self._ring._busy.release()


class Way(NamedTuple):
    """One way around a ring: messages come from the rank before and go to the next."""

    ring: Ring
    step: int  # 1 to the right, -1 to the left

    def send(self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Gate] = ()) -> Transfer:
        """See `Ring.send`."""
        return self.ring.send(load, tag=tag, after=after, step=self.step)

    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Gate] = ()) -> Transfer:
        """See `Ring.recv`."""
        return self.ring.recv(buffers, tag=tag, after=after, step=self.step)


@contextmanager
def timed(ring: Ring, kind: str, hop: int) -> Iterator[None]:
    """Note in the ring's trace, if it has one, how long the body took."""
    start = time.time()
    yield
    if ring.trace is not None:
        ring.trace.append(Event(kind, hop, start, time.time()))
