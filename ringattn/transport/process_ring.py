"""Rings of several processes: how they open, break and close, whatever moves their bytes."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from ..errors import RingError
from . import collectives
from .consensus import agree, is_lost_peer
from .failures.bandwidth import LinkRate
from .failures.cause import Cause
from .failures.control_channel import ControlChannel
from .failures.heartbeats import GRACE, Liveness, Member, Place
from .failures.stall_timer import Moving, StallTimer
from .failures.status_file import status
from .interface import Transport

ABORT_AFTER = 0.3  # s in which the main thread may find by itself that the ring broke


class ProcessRing(Transport):
    """A ring whose ranks are other processes, any of which may die.

    Attributes:
        _library_errors: The exceptions that the transport's library raises.

    Args:
        channel: Carries heartbeats, goodbyes and failures.
        rank: This rank.
        members: All ranks; their timeouts may differ.
    """

    _library_errors: tuple[type[BaseException], ...] = ()

    def __init__(self, channel: ControlChannel, rank: int, members: Sequence[Member]):
        super().__init__()
        self.rank = rank
        self.size = len(members)
        self.hosts = tuple(member.host for member in members)
        self.timeout = members[rank].timeout
        self._members = members
        self._place: Place = ("", 0)
        self._closed = False
        self._parent: ProcessRing | None = None  # the guarded ring that this one was split from
        self._names: Sequence[int] = range(self.size)  # of the ranks in messages: their ranks in the parent
        self._guarded_thread: int | None = None  # it makes calls that nothing can interrupt
        self._noticed = False  # that thread knows that the ring is broken
        self._broken_since: float | None = None
        # Often enough for the rank with the shortest timeout.
        self._interval = min(1.0, min(member.timeout for member in members) / 10)
        self._life = Liveness(
            channel,
            rank,
            members,
            self._interval,
            lambda: self._place,
            self._in_flight_with,
            lambda cause: status.broken(here=cause.rank in (None, rank)),
        )
        self._stall_timer = StallTimer(self._interval)
        status.opened(self.rank, self.size)

    # What users call

    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        with self.call("broadcast"):
            return collectives.broadcast(self, x, root)

    def all_reduce(self, x: mx.array) -> mx.array:
        with self.call("all_reduce"):
            return collectives.all_reduce(self, x, self._swap, self._share)

    @abc.abstractmethod
    def _swap(self, out: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        """See `collectives.Swap`."""

    @abc.abstractmethod
    def _share(self, own: memoryview, into: Sequence[memoryview]) -> None:
        """See `collectives.Share`."""

    def barrier(self) -> None:
        with self.call("barrier"):
            agree(self, "barrier")

    def close(self) -> None:
        if not self._closed:
            self.finish_trace()
            self._closed = True
            self._life.say_bye(patience=1.0)

    # What the library calls

    def guard_uninterruptible_calls(self) -> None:
        self._guarded_thread = threading.get_ident()

    def _report_to(self, parent: ProcessRing, members: Sequence[int]) -> None:
        """Break with the guarded ring `parent`, of which `members` are the ranks of this one, and by its judgement."""
        self._parent = parent
        self._names = [parent._names[member] for member in members]
        self._life.judges = False

    def await_cause(self, error: BaseException) -> None:
        """Wait for the message that explains `error`, which may be a mere consequence of another rank's death."""
        if is_lost_peer(error):
            deadline = time.monotonic() + self._cause_wait
            while not self.broken and time.monotonic() < deadline:
                time.sleep(5e-3)
                self.process_messages()

    @property
    def _cause_wait(self) -> float:
        """Seconds in which the cause of an error of `mx.distributed`, another rank's death, may arrive."""
        return 1.0

    def fail(self, error: BaseException) -> None:
        if self._parent is not None and not self.broken:  # ranks of other columns wait for this one, too
            self._parent.fail(error)
            error = self._parent.error or error
        self.await_cause(error)
        self._noticed = self._noticed or threading.get_ident() == self._guarded_thread
        if isinstance(error, RingError) and error.rank is not None:  # its text is complete
            self._life.fail(Cause("other", error.rank, error.host, hop=error.hop, detail=str(error)), error)
        else:
            self._life.fail(Cause.of_exception(error, self.rank, self.hosts[self.rank], *self._place))

    def set_progress(self, what: str, hop: int) -> None:
        if self._life.error is None:  # a broken ring stays where it broke
            self._place = (what, hop)
            if self._parent is not None and not self._parent.broken:
                self._parent._place = self._place
            status.write(what, hop)

    # What failures/shutdown.py calls

    @property
    def error(self) -> RingError | None:
        """The error that broke the ring, or ``None``."""
        return self._life.error

    @property
    def broken(self) -> bool:
        return self._life.error is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a process that ends because the ring broke: that of the rank that broke it, never 0."""
        return self._life.cause.exit_code if self._life.cause else 1

    @property
    def retired(self) -> bool:
        """Whether this ring is closed on all ranks, or on those that are alive."""
        return self._closed and self._life.everybody_left()

    @property
    def place(self) -> Place:
        """The call and the hop that this rank is in."""
        return self._place

    def process_messages(self) -> None:
        """Handle all received messages."""
        self._life.process_messages()

    @abc.abstractmethod
    def free(self) -> None:
        """Free the resources of a retired ring."""

    @abc.abstractmethod
    def abort(self) -> None:
        """End this process with `exit_code`, and the other processes of the job where the transport can."""

    def _broken_for(self) -> float:
        """Seconds since the helper thread first saw that the ring is broken."""
        now = time.monotonic()
        if self.broken and self._broken_since is None:
            self._broken_since = now
        return 0.0 if self._broken_since is None else now - self._broken_since

    # Waits that check peers

    def _check(self) -> None:
        if self._parent is not None:
            if not self._parent._closed:  # its communicators may be gone afterwards
                self._parent.process_messages()
            self._parent._raise_error()
        self._raise_error()
        if self._closed:
            raise RingError("this ring is closed")

    def _raise_error(self) -> None:
        if self._life.error is not None:
            self._noticed = self._noticed or threading.get_ident() == self._guarded_thread
            raise self._life.error

    def _peer_check(self, missing: Callable[[], set[int]]) -> Callable[[], None]:
        """A function to call now and then in a wait: it raises if a rank that is `missing` has left or is dead."""
        since: dict[int, float] = {}  # when a missing rank was first seen to have left

        def check() -> None:
            self._life.process_messages()
            self._check()
            now = time.monotonic()
            for peer in missing() & self._life.left:
                # Messages that it sent before it left may still be on the way.
                if now - since.setdefault(peer, now) > GRACE:
                    own = f"rank {self._names[self.rank]}"
                    raise Cause("left", self._names[peer], self.hosts[peer], *self._place, own).error

        return check

    def _in_flight_with(self, peer: int) -> list[list]:
        """The messages under way between this rank and `peer`; see `Liveness`."""
        return []

    def _check_links(
        self, found: Sequence[Moving], rate: LinkRate, more: Sequence[object] = (), timer: StallTimer | None = None
    ) -> dict[object, float]:
        """Break the ring when a message of `found` is overdue: its bytes take longer than at a tenth of `rate`.

        Returns:
            The seconds since each of these messages, and of the keys in `more`, was first seen.
        """
        ages = (timer or self._stall_timer).look([*(one.key for one in found), *more])
        for one in found:
            allowed = rate.deadline(one.bytes, self.timeout)
            if ages[one.key] > allowed:
                detail = f"{one.bytes} bytes {'to' if one.sending else 'from'}"
                note = f": both ends have been at it for {allowed:.1f} s, and it lives; look at the cable between them"
                self.fail(Cause("stuck", self._names[one.peer], self.hosts[one.peer], *self._place, detail, note).error)
        return ages

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Break the ring if an exception is raised here; an error of the transport's library becomes the ring's."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            if isinstance(error, self._library_errors):
                self._check()
            raise
