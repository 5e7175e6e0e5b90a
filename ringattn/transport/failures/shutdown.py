"""How a process leaves its rings: an uncaught exception reaches the peers, and no exit hangs.

MPI ends a process together with all others, so a rank that finishes would wait for ever for one that died. Here it
waits with its helper threads still listening: when all have said goodbye, mpi4py ends MPI; when a ring breaks, the
whole job is ended, after the other ranks had time to say why.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from .cause import Cause

if TYPE_CHECKING:
    from ..process_ring import PeerRing

PATIENCE = 1.5  # s in which the other ranks of a broken ring can print what they know

_rings: list[PeerRing] = []  # those that are not retired, the oldest first
_previous_hook = sys.excepthook


def watch_over(ring: PeerRing) -> None:
    """See to it that `ring` is left properly however this process ends."""
    global _previous_hook
    if sys.excepthook is not _tell:
        _previous_hook, sys.excepthook = sys.excepthook, _tell
    atexit.unregister(_leave)
    atexit.register(_leave)  # registered after mpi4py was imported, so run before it ends MPI
    for old in [old for old in _rings if old.retired and not old.broken]:
        _rings.remove(old)
        old.free()
    _rings.append(ring)


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception as ever, then where it happened, and break this process's rings."""
    _previous_hook(kind, error, traceback)
    for ring in _rings:
        ring.await_cause(error)
    _report(error)
    for ring in _rings:
        if ring.error is not None and ring.error.rank != ring.rank and ring.error is not error:
            # What was raised is what came of it, not the cause.
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
        _end()
    for ring in _rings:
        ring.free()


def _listen(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(5e-3)
        for ring in _rings:
            ring.hear()


def _end() -> None:
    """End the job, a little after a ring broke."""
    deadline = time.monotonic() + PATIENCE
    _listen(lambda: all(ring.retired for ring in _rings if ring.broken) or time.monotonic() > deadline)
    sys.stdout.flush()
    sys.stderr.flush()
    _rings[0].abort()


def abandon(ring: PeerRing) -> None:
    """End the job from the helper thread of `ring`, whose main thread will not come back from MPI."""
    if ring.error is not None:
        _report(ring.error)
    _end()
