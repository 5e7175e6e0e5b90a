"""Spans of a rank's work on a ring, and the tracers that record them."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
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


_NO_SPAN = nullcontext()


class Tracer:
    """Tracer that records nothing. `Recorder` records.

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

    def span(self, kind: str, hop: int, buffers: Sequence[memoryview] = ()) -> AbstractContextManager[None]:
        """Record the duration of the body of a ``with`` statement, and the bytes of `buffers`."""
        return _NO_SPAN


NO_TRACER = Tracer()


class Recorder(Tracer, AbstractContextManager[None]):
    """Tracer that appends to `events`.

    A new token has a few spans in each layer, so a span must cost little: the recorder itself is the context manager of
    the span that `span` has opened last, and has as many Python frames for it as a tracer that records nothing.

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
        self._append = events.append if plain else lambda fields: events.append(Event(*fields))
        self._call = ""  # the present call
        self._strategy = ""
        self._calls: list[tuple[str, str, int, float]] = []  # the call around and its strategy, bytes before, start
        self._spans: list[tuple[str, int, int, float]] = []  # kind, hop, bytes, start
        self._push = self._spans.append
        self._pop = self._spans.pop
        self._sent = 0

    def begin(self, call: str) -> None:
        self._calls.append((self._call, self._strategy, self._sent, time()))
        self._call = call
        self._strategy = ""

    def choose(self, strategy: str) -> None:
        if self._calls:
            self._strategy = strategy

    def end(self) -> None:
        if self._calls:  # empty if the trace began within the call
            stop = time()
            call, strategy, sent, start = self._calls.pop()
            self.added += 1
            self._append(("call", 0, start, stop, self._sent - sent, self._call, self._strategy))
            self._call = call
            self._strategy = strategy

    def add(self, kind: str, hop: int, start: float, stop: float, count: int = 0) -> None:
        if kind == "send":
            self._sent += count
        self.added += 1
        self._append((kind, hop, start, stop, count, self._call, self._strategy))

    def span(self, kind: str, hop: int, buffers: Sequence[memoryview] = ()) -> AbstractContextManager[None]:
        self._push((kind, hop, sum(map(len, buffers)) if buffers else 0, time()))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop = time()
        kind, hop, count, start = self._pop()
        self.added += 1
        self._append((kind, hop, start, stop, count, self._call, self._strategy))
