"""Threads that move bytes over `mx.distributed`, one thing after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .matching import Parcel


@dataclass
class Work:
    """One thing for a lane to do, on its stream."""

    do: Callable[[Any], Any]
    epoch: int | None  # the gathers before it; None for a gather
    parcels: tuple[Parcel, ...] = ()
    done: bool = False
    result: Any = None


class Lane:
    """A thread that works off a queue.

    Args:
        name: Of the thread.
        lock: Guards what it shares; held in all calls but those of `on_error`.
        admits: Whether the first of the queue may start.
        on_done: Called when something is done.
        on_error: Called with what went wrong; nothing is done any more after that.
    """

    def __init__(
        self,
        name: str,
        lock: threading.RLock,
        admits: Callable[[Work], bool],
        on_done: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ):
        self._lock, self._admits, self._on_done, self._on_error = lock, admits, on_done, on_error
        self.queue: deque[Work] = deque()
        self.busy = False
        self.doing: Work | None = None
        self.bell = threading.Condition(lock)
        threading.Thread(target=self._run, name=f"ringattn {name}", daemon=True).start()

    @property
    def idle(self) -> bool:
        return not self.queue and not self.busy

    def add(self, work: Work) -> None:
        self.queue.append(work)
        self.bell.notify()

    def empty_before(self, epoch: int) -> bool:
        """Whether nothing is left that was committed before gather `epoch`."""
        return not self.busy and all(work.epoch is None or work.epoch >= epoch for work in self.queue)

    def _run(self) -> None:
        stream = mx.new_stream(mx.cpu)  # a stream belongs to the thread that made it
        while True:
            with self._lock:
                self.bell.wait_for(lambda: self.queue and self._admits(self.queue[0]))
                self.doing = work = self.queue.popleft()
                self.busy = True
            try:
                work.result = work.do(stream)
            except BaseException as error:
                return self._on_error(error)  # busy for ever: what is still queued has no sense any more
            with self._lock:
                self.busy, self.doing = False, None
                work.done = True
                for parcel in work.parcels:
                    parcel.finish()
                self._on_done()
