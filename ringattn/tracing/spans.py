"""Spans of a rank's work on a ring, and the tracers that record them."""

from __future__ import annotations

import time
from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

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

    events: MutableSequence[Event] | None = None

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


class Recorder(Tracer):
    """Tracer that appends to `events`."""

    def __init__(self, events: MutableSequence[Event]):
        self.events: MutableSequence[Event] = events
        self._calls: list[_OpenCall] = []
        self._sent = 0

    def begin(self, call: str) -> None:
        self._calls.append(_OpenCall(call, self._sent))

    def choose(self, strategy: str) -> None:
        if self._calls:
            self._calls[-1].strategy = strategy

    def end(self) -> None:
        if self._calls:  # empty if the trace began within the call
            call = self._calls[-1]
            self.add("call", 0, call.start, time.time(), self._sent - call.sent)
            self._calls.pop()

    def add(self, kind: str, hop: int, start: float, stop: float, count: int = 0) -> None:
        if kind == "send":
            self._sent += count
        open_calls = self._calls[-1:]
        labels = (open_calls[0].name, open_calls[0].strategy) if open_calls else ("", "")
        self.events.append(Event(kind, hop, start, stop, count, *labels))

    def span(self, kind: str, hop: int, buffers: Sequence[memoryview] = ()) -> AbstractContextManager[None]:
        return _Span(self, kind, hop, sum(map(len, buffers)))


class _OpenCall:
    def __init__(self, name: str, sent: int):
        self.name = name
        self.strategy = ""
        self.sent = sent  # bytes before the call
        self.start = time.time()


class _Span(AbstractContextManager[None]):
    def __init__(self, tracer: Tracer, kind: str, hop: int, count: int):
        self._tracer = tracer
        self._what = (kind, hop)
        self._count = count

    def __enter__(self) -> None:
        self._start = time.time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracer.add(*self._what, self._start, time.time(), self._count)
