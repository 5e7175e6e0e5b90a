"""Threads that move bytes over `mx.distributed`, one task after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .matching import PendingMessage


@dataclass
class Task:
    """One call into `mx.distributed`.

    Attributes:
        run: The call, given the stream of the thread.
        epoch: The number of gathers before it; ``None`` for a gather.
        messages: The messages that it moves.
        done: Whether it has returned.
        result: The value that it returned.
    """

    run: Callable[[Any], Any]
    epoch: int | None
    messages: tuple[PendingMessage, ...] = ()
    done: bool = False
    result: Any = None


class WorkerThread:
    """A thread that runs the tasks of a queue in order.

    Args:
        name: The name of the thread.
        lock: The lock of the scheduler. All methods and callbacks but `on_error` need it.
        may_start: Returns whether the first task of the queue may start.
        on_done: Called after each task.
        on_error: Called with the exception of a task. The thread ends after it.
    """

    def __init__(
        self,
        name: str,
        lock: threading.RLock,
        may_start: Callable[[Task], bool],
        on_done: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ):
        self._lock = lock
        self._may_start = may_start
        self._on_done = on_done
        self._on_error = on_error
        self.queue: deque[Task] = deque()
        self.busy = False
        self.current: Task | None = None
        self.wakeup = threading.Condition(lock)
        threading.Thread(target=self._run, name=f"ringattn {name}", daemon=True).start()

    @property
    def idle(self) -> bool:
        return not self.queue and not self.busy

    def add(self, task: Task) -> None:
        self.queue.append(task)
        self.wakeup.notify()

    def drained_before(self, epoch: int) -> bool:
        """Whether all tasks that were committed before gather `epoch` are done."""
        return not self.busy and all(task.epoch is None or task.epoch >= epoch for task in self.queue)

    def _run(self) -> None:
        stream = mx.new_stream(mx.cpu)  # a stream belongs to the thread that made it
        while True:
            with self._lock:
                self.wakeup.wait_for(lambda: self.queue and self._may_start(self.queue[0]))
                self.current = task = self.queue.popleft()
                self.busy = True
            try:
                task.result = task.run(stream)
            except BaseException as error:
                return self._on_error(error)  # stays busy, so no later task counts as possible
            with self._lock:
                self.busy = False
                self.current = None
                task.done = True
                for message in task.messages:
                    message.finish()
                self._on_done()
