"""The ring as users see it: all ranks in order, and the collectives that they call."""

from __future__ import annotations

import abc
from collections.abc import MutableSequence
from types import TracebackType

import mlx.core as mx

from ..errors import ArgumentError, ArgumentTypeError
from ..tracing.spans import NO_TRACER, Event, Recorder, Tracer

__all__ = ["Event", "Ring"]


class Ring(abc.ABC):
    """All ranks in order, each with a left and a right neighbour. A context manager: leaving it closes the ring.

    `ringattn.init` makes it.

    Attributes:
        backend: The transport: ``"mpi"``, ``"mlx"`` or ``"solo"``.
        rank: This process's place, ``0 <= rank < size``.
        size: The number of ranks.
        hosts: The host name of every rank.
        timeout: Seconds without a heartbeat after which a peer counts as dead.
        bytes_sent: Bytes of blocks and states that this rank has sent to its neighbours so far.
        duplex: Whether a rank can send and receive on all its links at the same time.
    """

    backend: str
    rank: int
    size: int
    hosts: tuple[str, ...]
    timeout: float
    bytes_sent: int = 0
    duplex: bool = True
    _both_ways: bool | None = None
    _tracer: Tracer = NO_TRACER

    def __repr__(self) -> str:
        return f"Ring(backend={self.backend!r}, rank={self.rank}, size={self.size}, hosts={self.hosts!r})"

    def __dir__(self) -> list[str]:
        """List the names that users need: completion shows these, and not those of the library's `Transport`."""
        return sorted({*dir(Ring), *Ring.__annotations__})

    @property
    def both_ways(self) -> bool | None:
        """Whether `ring_attention` halves blocks and sends one half to the right, one to the left: the same everywhere.

        A cable between neighbours carries both directions at once, so a hop's transfer takes half the time. ``None``,
        the default, is yes where there are three ranks or more, neighbours are on different hosts, blocks are long,
        and no block has to travel further for it. The result may differ in its last bits, because the order of the
        sums differs.

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
    def trace(self) -> MutableSequence[Event] | None:
        """The list that collects `Event`s, or ``None``. Set a list to record, and ``None`` to stop."""
        return self._tracer.events

    @trace.setter
    def trace(self, events: MutableSequence[Event] | None) -> None:
        self._tracer = NO_TRACER if events is None else Recorder(events)

    @abc.abstractmethod
    def split(self, color: int | None) -> Ring | None:
        """Open the ring of the ranks that give the same `color`, in the same order; ``None`` joins no ring."""

    @abc.abstractmethod
    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        """Return the `x` of rank `root` on every rank. The other ranks may pass ``None``; their `x` is ignored."""

    @abc.abstractmethod
    def all_reduce(self, x: mx.array) -> mx.array:
        """Sum `x` over all ranks (same shape and dtype everywhere): the same bits on every rank and every run."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the ring; a peer that still waits for this rank gets a `RingError`. Closing twice does nothing."""

    @abc.abstractmethod
    def __enter__(self) -> Ring: ...

    @abc.abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the ring; an exception breaks it for all ranks first."""
