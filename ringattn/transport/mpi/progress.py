"""Messages to and from the neighbours, and the helper thread that moves them while the main thread computes.

Large MPI messages move only while somebody calls MPI. While the main thread computes, the helper polls with short
sleeps, which leaves it the core; while the main thread waits, it polls at full speed itself and the helper sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import RingError
from ..failures.bandwidth import LinkRate
from ..failures.stall_timer import Moving
from ..interface import Buffers, Signal, Transfer

# The longest single message. Its arrival is a sign of life of its sender, whose heartbeats wait behind its data on a
# slow link; and some MPIs refuse more than 2**31 bytes.
CHUNK_BYTES = 4 << 20


class Message(Transfer):
    """One send or receive: blocked until all of `after` are done, then active, then done."""

    def __init__(self, kind: str, peer: int, tag: int, load: Callable[[], Buffers], after: Sequence[Transfer | Signal]):
        self.kind = kind
        self.peer = peer
        self.tag = tag
        self.after = list(after)
        self.bytes = 0
        self.started = 0.0
        self._load: Callable[[], Buffers] | None = load
        self._chunks: list[memoryview] = []
        self._requests: list[Any] = []
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    @property
    def ready(self) -> bool:
        while self.after and self.after[-1].done:
            self.after.pop()
        return not self.after

    @property
    def waits_for_signal(self) -> bool:
        """Whether it waits for a signal that is not open."""
        return any(isinstance(a, Signal) and not a.done for a in self.after)

    def start(self, post: Callable[[memoryview, int, int], Any]) -> None:
        assert self._load is not None
        self.started = time.time()
        self._chunks = chunks(self._load())
        self._load = None  # frees the arrays that it refers to
        self.bytes = sum(len(chunk) for chunk in self._chunks)
        self._requests = [post(chunk, self.peer, self.tag) for chunk in self._chunks]

    def poll(self, status: Any, byte: Any, on_arrival: Callable[[int], None]) -> bool:
        """Test its requests; whether all are done. Chunks arrive in order, so the first missing one ends the test."""
        while self._requests:
            if not self._test(status):
                return False
            if self.kind == "recv" and (got := status.Get_count(byte)) != len(self._chunks[0]):
                raise RingError(
                    f"rank {self.peer} sent {got} bytes where {len(self._chunks[0])} were expected (tag {self.tag})",
                    rank=self.peer,
                )
            if self.kind == "recv":
                on_arrival(self.peer)
            del self._requests[0], self._chunks[0]
        self._done = True
        return True

    @property
    def left(self) -> list[int]:
        """The bytes of each chunk that is not done."""
        return [len(chunk) for chunk in self._chunks]

    def _test(self, status: Any) -> bool:
        try:
            done: bool = self._requests[0].Test(status)
        except Exception as error:  # MPI raises this when the other process is gone: name that rank
            way = "to" if self.kind == "send" else "from"
            lines = str(error).splitlines()
            raise RingError(f"a message {way} rank {self.peer} broke off ({lines[-1]})", rank=self.peer) from error
        return done


def chunks(buffers: Buffers) -> list[memoryview]:
    """Cut `buffers` into messages of at most `CHUNK_BYTES`; an empty buffer makes none."""
    return [buffer[start : start + CHUNK_BYTES] for buffer in buffers for start in range(0, len(buffer), CHUNK_BYTES)]


class MessageEngine:
    """The engine that starts and finishes messages. Any thread may call `step`; one at a time runs it.

    Args:
        post_send: Starts to send a buffer to a rank under a tag and returns the request.
        post_recv: The same for receiving.
        new_status: Makes an MPI status object.
        byte: MPI's type of a byte.
        on_done: Called with every message that has finished.
        on_arrival: Called with the rank from which a message has arrived.
    """

    def __init__(
        self,
        post_send: Callable[[memoryview, int, int], Any],
        post_recv: Callable[[memoryview, int, int], Any],
        new_status: Callable[[], Any],
        byte: Any,
        on_done: Callable[[Message], None],
        on_arrival: Callable[[int], None],
    ):
        self._post = {"send": post_send, "recv": post_recv}
        self._status = new_status()
        self._byte = byte
        self._on_done = on_done
        self._on_arrival = on_arrival
        self._fresh: list[Message] = []  # appended by the main thread without a lock
        self._blocked: list[Message] = []
        self._active: list[Message] = []
        self._turn = threading.Lock()
        self.rate = LinkRate()

    def add(self, message: Message) -> None:
        self._fresh.append(message)

    @property
    def idle(self) -> bool:
        """Whether no message can move until one is added or a signal opens."""
        return not self._active and all(message.waits_for_signal for message in [*self._fresh, *self._blocked])

    @property
    def poll_interval(self) -> float:
        """Seconds until the next step while the main thread computes."""
        return self.rate.poll_interval([message.bytes for message in list(self._active)])

    def in_flight_with(self, peer: int) -> list[list]:
        """The messages between this rank and `peer` that are under way here, in the form that `moving` reads there."""
        return [[message.kind, message.tag] for message in list(self._active) if message.peer == peer]

    def moving(self, reports: Mapping[int, list[list]]) -> list[Moving]:
        """The messages that are under way at both ends, according to the other ranks' `reports`."""
        other_end = {"send": "recv", "recv": "send"}
        found = []
        for message in list(self._active):
            left = message.left
            if left and [other_end[message.kind], message.tag] in reports.get(message.peer, ()):
                found.append(Moving((message, len(left)), message.kind == "send", message.peer, left[0]))
        return found

    @property
    def peers(self) -> set[int]:
        """The ranks at the other ends of active messages."""
        return {message.peer for message in list(self._active)}

    def step(self, wait: bool = True) -> None:
        """Start and finish what is ready. Without `wait`, return at once if another thread is doing so."""
        if not self._turn.acquire(blocking=wait):
            return
        try:
            while self._finish() or self._start():
                pass
        finally:
            self._turn.release()

    def _finish(self) -> bool:
        finished = [message for message in self._active if message.poll(self._status, self._byte, self._on_arrival)]
        for message in finished:
            self._active.remove(message)
            self.rate.learn(message.bytes, time.time() - message.started)
            self._on_done(message)
        return bool(finished)

    def _start(self) -> bool:
        while self._fresh:
            self._blocked.append(self._fresh.pop(0))
        ready = [message for message in self._blocked if message.ready]
        for message in ready:
            self._blocked.remove(message)
            message.start(self._post[message.kind])
            self._active.append(message)
        return bool(ready)


class ProgressThread:
    """The helper thread of a ring: steps the engine while messages are under way, and sends heartbeats.

    Args:
        engine: The engine to step.
        beat: Called every `interval` seconds.
        interval: Returns the seconds between two heartbeats.
        on_error: Called with an exception of the engine; the thread goes on with the heartbeats.
        retired: Called whenever the thread wakes; the thread ends when it returns ``True``.
    """

    def __init__(
        self,
        engine: MessageEngine,
        beat: Callable[[], None],
        interval: Callable[[], float],
        on_error: Callable[[BaseException], None],
        retired: Callable[[], bool],
    ):
        self._engine = engine
        self._beat = beat
        self._interval = interval
        self._on_error = on_error
        self._retired = retired
        self._work_added = threading.Condition()
        self._sleeping = False  # until work is added
        self.broken = False  # the engine moves no message any more
        self.main_thread_polls = False  # the main thread waits, and steps the engine itself
        self._thread = threading.Thread(target=self._run, name="ringattn", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Wake the thread because there is work for it."""
        if self._sleeping:
            with self._work_added:
                self._work_added.notify()

    def join(self) -> None:
        """Wait for the end of the thread of a retired ring; it makes no MPI call afterwards."""
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._retired():
            if time.monotonic() >= due:
                self._guard(self._beat)
                due = time.monotonic() + self._interval()
            if not self._sleep_if_idle(due):
                self._guard(self._engine.step)
                time.sleep(self._engine.poll_interval)

    def _sleep_if_idle(self, due: float) -> bool:
        with self._work_added:
            # Set before the engine is read: a thread that adds a message after the read sees it and calls `wake`.
            self._sleeping = True
            idle = self.broken or self.main_thread_polls or self._engine.idle
            if idle:
                self._work_added.wait(max(0.0, due - time.monotonic()))
            self._sleeping = False
        return idle

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # any exception must reach the main thread and the peers
            self.broken = True
            self._on_error(error)
