"""Shutdown: a process reports an uncaught exception to its peers, and no exit hangs.

MPI ends a process together with all others, so a rank that finishes would wait for ever for one that died. Here it
waits while its helper threads still listen. When all have said goodbye, mpi4py ends MPI. When a ring breaks, the whole
job is ended, after the other ranks had time to print why.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from ...errors import RingError
from .cause import Cause

GRACE = 1.5  # s in which the other ranks of a broken ring can print what they know


class LeavableRing(Protocol):
    """A ring, as far as shutdown knows it. `ProcessRing` describes the members."""

    rank: int
    hosts: tuple[str, ...]

    @property
    def error(self) -> RingError | None: ...

    @property
    def broken(self) -> bool: ...

    @property
    def retired(self) -> bool: ...

    @property
    def place(self) -> tuple[str, int]: ...

    def process_messages(self) -> None: ...

    def await_cause(self, error: BaseException) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def close(self) -> None: ...

    def free(self) -> None: ...

    def abort(self) -> None: ...


_rings: list[LeavableRing] = []  # not retired, the oldest first
_previous_hook = sys.excepthook


def register_ring(ring: LeavableRing) -> None:
    """Close `ring` properly, however this process ends."""
    global _previous_hook
    if sys.excepthook is not _excepthook:
        _previous_hook = sys.excepthook
        sys.excepthook = _excepthook
    atexit.unregister(_leave)
    atexit.register(_leave)  # registered after mpi4py was imported, so run before it ends MPI
    for old in [old for old in _rings if old.retired and not old.broken]:
        _rings.remove(old)
        old.free()
    _rings.append(ring)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception as usual, then where it happened, and break this process's rings."""
    _previous_hook(kind, error, traceback)
    for ring in _rings:
        ring.await_cause(error)
    _report(error)
    for ring in _rings:
        if ring.error is not None and ring.error.rank != ring.rank and ring.error is not error:
            # The exception is a consequence of this error.
            print(f"ringattn: {ring.error}", file=sys.stderr, flush=True)
            break
    for ring in _rings:
        ring.fail(error)


def _report(error: BaseException) -> None:
    if _rings:
        # The oldest ring is that of the whole job, and its ranks are those that a launcher counts.
        job = _rings[0]
        place = next((ring for ring in _rings if ring.broken), job).place
        cause = Cause.of_exception(error, job.rank, job.hosts[job.rank], *place)
        print(f"ringattn: {cause}", file=sys.stderr, flush=True)


def _leave() -> None:
    for ring in _rings:
        ring.close()
    _listen(lambda: any(ring.broken for ring in _rings) or all(ring.retired for ring in _rings))
    if any(ring.broken for ring in _rings):
        _abort_after_grace()
    for ring in _rings:
        ring.free()


def _listen(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(5e-3)
        for ring in _rings:
            ring.process_messages()


def _abort_after_grace() -> None:
    """End the job, `GRACE` seconds after a ring broke."""
    deadline = time.monotonic() + GRACE
    _listen(lambda: all(ring.retired for ring in _rings if ring.broken) or time.monotonic() > deadline)
    sys.stdout.flush()
    sys.stderr.flush()
    _rings[0].abort()


def abort_from_helper(ring: LeavableRing) -> None:
    """End the job from the helper thread of `ring`, whose main thread does not return from the library's call."""
    if ring.error is not None:
        _report(ring.error)
    _abort_after_grace()
