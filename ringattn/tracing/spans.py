"""Spans of a rank's work on a ring, and the tracers that record them."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from contextlib import AbstractContextManager
from functools import partial
from time import time
from types import TracebackType
from typing import Any, NamedTuple

RESULTS = 4096  # messages of blocks have the number of their hop; messages of results have it plus this number


class Event(NamedTuple):
    """One span of a rank's timeline.

    Attributes:
        kind: ``"compute"``, ``"send"``, ``"recv"``, ``"wait"`` (for messages), ``"exchange"`` (a round in which every
            rank learns the bytes of all others) or ``"call"`` (a whole collective call).
        hop: Hop of the call; from `RESULTS` on, the message of a result.
        start: Start in seconds of ``time.time()``.
        stop: End in seconds of ``time.time()``.
        bytes: Bytes of the message; of an exchange, those of this rank; of a call, all that this rank sent.
        call: Name of the collective call.
        strategy: Strategy of the call, such as ``"pass_kv"``, where it has one.
    """

    kind: str
    hop: int
    start: float
    stop: float
    bytes: int = 0
    call: str = ""
    strategy: str = ""


# As `Event._make`, without its Python frame.
_to_event: Callable[[tuple], Event] = partial(tuple.__new__, Event)


class Tracer:
    """Tracer that records nothing. `Recorder` records.

    It is the context manager of its spans, so that a span makes no object and has the same Python frames with both.

    Attributes:
        events: Recorded events; ``None`` where nothing is recorded.
    """

    events: MutableSequence[Any] | None = None

    def begin(self, call: str) -> None:
        """Begin a collective call. Calls may be nested."""

    def choose(self, strategy: str) -> None:
        """Note the strategy of the present call."""

    def end(self) -> None:
        """End the present call."""

    def add(self, kind: str, hop: int, start: float, stop: float, count: int = 0) -> None:
        """Record a span of `count` bytes. Any thread may call this."""

    def span(self, kind: str, hop: int, count: int = 0) -> AbstractContextManager[None]:
        """Record the duration of the body of a ``with`` statement, which moves `count` bytes."""
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


NO_TRACER = Tracer()


class Recorder(Tracer):
    """Tracer that appends to `events`.

    A new token has a few spans in each layer. Between two of them the attention replaces the contents of the caches, so
    that a span costs several times what a loop over spans shows, in proportion to the code and the objects that it
    touches. So it does little: it reads the clock twice, makes two tuples and appends one of them.

    Args:
        events: Sequence for the events.
        plain: Whether to append tuples with the fields of an `Event` instead. They take less time, and the garbage
            collector of Python visits each of them once, but an `Event` in each of its passes.

    Attributes:
        added: Number of events so far, with those that a full deque has dropped.
    """

    def __init__(self, events: MutableSequence[Any], plain: bool = False):
        self.events: MutableSequence[Any] = events
        self.added = 0
        self._append = events.append if plain else lambda fields: events.append(_to_event(fields))
        # Both begin with the call or the span around: the last one is the innermost.
        self._call: tuple[Any, str, str, int, float] = (None, "", "", 0, 0.0)  # name, strategy, bytes before, start
        self._span: Any = None  # kind, hop, bytes, start
        self._sent = 0

    def begin(self, call: str) -> None:
        self._call = (self._call, call, "", self._sent, time())

    def choose(self, strategy: str) -> None:
        around, call, _, sent, start = self._call
        if around is not None:
            self._call = (around, call, strategy, sent, start)

    def end(self) -> None:
        around, call, strategy, sent, start = self._call
        if around is not None:  # None if the trace began within the call
            self._call = around
            self.added += 1
            self._append(("call", 0, start, time(), self._sent - sent, call, strategy))

    def add(self, kind: str, hop: int, start: float, stop: float, count: int = 0) -> None:
        if kind == "send":
            self._sent += count
        call = self._call
        self.added += 1
        self._append((kind, hop, start, stop, count, call[1], call[2]))

    def span(self, kind: str, hop: int, count: int = 0) -> AbstractContextManager[None]:
        self._span = (self._span, kind, hop, count, time())
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop = time()
        self._span, kind, hop, count, start = self._span
        call = self._call
        self.added += 1
        self._append((kind, hop, start, stop, count, call[1], call[2]))
