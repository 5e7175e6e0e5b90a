"""Messages to and from the neighbours, and the helper thread that moves them while the main thread computes.

Large MPI messages move only while somebody calls MPI. While the main thread computes, the helper polls with short
sleeps, which leaves it the core; while the main thread waits, it polls at full speed itself and the helper rests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import RingError
from ..failures.bandwidth import LinkRate
from ..failures.stall_timer import Moving
from ..interface import Buffers, Gate, Transfer

# The longest single message. Its arrival is a sign of life of its sender, whose heartbeats wait behind its data on a
# slow link; and some MPIs refuse more than 2**31 bytes.
CHUNK_BYTES = 4 << 20


class Message(Transfer):
    """One send or receive: blocked until all of `after` are done, then active, then done."""

    def __init__(self, kind: str, peer: int, tag: int, load: Callable[[], Buffers], after: Sequence[Transfer | Gate]):
        self.kind, self.peer, self.tag = kind, peer, tag
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
    def gated(self) -> bool:
        """Whether it waits for a gate that somebody has still to open."""
        return any(isinstance(a, Gate) and not a.done for a in self.after)

    def start(self, post: Callable[[memoryview, int, int], Any]) -> None:
        assert self._load is not None
        self.started = time.time()
        self._chunks = chunks(self._load())
        self._load = None  # what it holds on to can go
        self.bytes = sum(len(chunk) for chunk in self._chunks)
        self._requests = [post(chunk, self.peer, self.tag) for chunk in self._chunks]

    def poll(self, status: Any, byte: Any, on_arrival: Callable[[int], None]) -> bool:
        """Ask MPI once how far it is. Chunks are matched in order, so the first one not there ends the look."""
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
        """The bytes of each chunk that has not passed."""
        return [len(chunk) for chunk in self._chunks]

    def _test(self, status: Any) -> bool:
        try:
            done: bool = self._requests[0].Test(status)
        except Exception as error:  # MPI says so when the other side is gone; it is that rank's end that matters
            way = "to" if self.kind == "send" else "from"
            lines = str(error).splitlines()
            raise RingError(f"a message {way} rank {self.peer} broke off ({lines[-1]})", rank=self.peer) from error
        return done


def chunks(buffers: Buffers) -> list[memoryview]:
    """`buffers` cut into messages of at most `CHUNK_BYTES`; an empty buffer makes none."""
    return [buffer[at : at + CHUNK_BYTES] for buffer in buffers for at in range(0, len(buffer), CHUNK_BYTES)]


class Engine:
    """Starts and finishes messages. Any thread may `step` it; one at a time does.

    Args:
        post_send: Starts to send a buffer to a rank under a tag and returns the request.
        post_recv: The same for receiving.
        new_status: Makes an MPI status object.
        byte: MPI's type of a byte.
        on_done: Called with every message that has finished.
        on_arrival: Called with the rank that something has come from.
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
        self._status, self._byte, self._on_done, self._on_arrival = new_status(), byte, on_done, on_arrival
        self._fresh: list[Message] = []  # appended by the main thread without a lock
        self._blocked: list[Message] = []
        self._active: list[Message] = []
        self._turn = threading.Lock()
        self.rate = LinkRate()

    def add(self, message: Message) -> None:
        self._fresh.append(message)

    @property
    def resting(self) -> bool:
        """Whether nothing can happen until somebody adds a message or opens a gate."""
        return not self._active and all(message.gated for message in [*self._fresh, *self._blocked])

    @property
    def nap(self) -> float:
        """Seconds that may pass until the next step while the main thread computes."""
        return self.rate.nap([message.bytes for message in list(self._active)])

    def told_of(self, peer: int) -> list[list]:
        """The messages between this rank and `peer` that are under way here, as the other's `moving` takes them."""
        return [[message.kind, message.tag] for message in list(self._active) if message.peer == peer]

    def moving(self, told: Mapping[int, list[list]]) -> list[Moving]:
        """The messages that are under way at both ends, by what the other ranks have told."""
        other_end = {"send": "recv", "recv": "send"}
        found = []
        for message in list(self._active):
            left = message.left
            if left and [other_end[message.kind], message.tag] in told.get(message.peer, ()):
                found.append(Moving((message, len(left)), message.kind == "send", message.peer, left[0]))
        return found

    @property
    def peers(self) -> set[int]:
        """The ranks that have to do something for an active message to finish."""
        return {message.peer for message in list(self._active)}

    def step(self, wait: bool = True) -> None:
        """Move whatever can be moved now. Without `wait`, leave it to the thread that is at it already."""
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


class Helper:
    """The one helper thread of a ring: steps the engine while messages are under way, and beats.

    Args:
        engine: What to step.
        beat: Called every `interval` seconds.
        interval: See there.
        on_error: Called with what the engine raised; the thread goes on beating.
        retired: Asked whenever the thread wakes; it ends when this says True.
    """

    def __init__(
        self,
        engine: Engine,
        beat: Callable[[], None],
        interval: float,
        on_error: Callable[[BaseException], None],
        retired: Callable[[], bool],
    ):
        self._engine, self._beat, self._interval, self._on_error = engine, beat, interval, on_error
        self._retired = retired
        self._bell = threading.Condition()
        self._resting = False  # asleep on the bell
        self.broken = False  # nothing moves any more
        self.relieved = False  # the main thread waits, and steps the engine itself
        self._thread = threading.Thread(target=self._run, name="ringattn", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Wake the thread: there is something to do."""
        if self._resting:
            with self._bell:
                self._bell.notify()

    def join(self) -> None:
        """Wait for the end of the thread, which must have reason to retire; it holds no MPI call afterwards."""
        self.ring()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._retired():
            if time.monotonic() >= due:
                self._guard(self._beat)
                due = time.monotonic() + self._interval
            if not self._rest(due):
                self._guard(self._engine.step)
                time.sleep(self._engine.nap)

    def _rest(self, due: float) -> bool:
        with self._bell:
            # Raised before the look at the engine: whoever adds a message after the look sees it and rings.
            self._resting = True
            idle = self.broken or self.relieved or self._engine.resting
            if idle:
                self._bell.wait(max(0.0, due - time.monotonic()))
            self._resting = False
        return idle

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it must reach the main thread and the peers
            self.broken = True
            self._on_error(error)
