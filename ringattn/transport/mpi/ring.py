"""The transport over MPI, through mpi4py. MPI starts when a ring is opened, not when this is imported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import ArgumentTypeError, RingError
from .. import collectives
from ..base import Ring
from ..consensus import agree, raise_on_all_ranks
from ..failures import shutdown
from ..failures.control_channel import MpiControlChannel
from ..failures.heartbeats import Member
from ..failures.stall_timer import StallTimer
from ..gpu.connect import agree_on_gpus, connect
from ..gpu.links import DeviceLinks, DeviceMessage
from ..handshake import introduce
from ..interface import Buffers, Signal, Transfer, Transport
from ..process_ring import ABORT_AFTER, ProcessRing
from .all_to_all import Round, Swap
from .library import load_mpi
from .polling import wait_until
from .progress import Message, MessageEngine, ProgressThread

FIRST_TAG = 16  # MPI tag of message 0; lower tags are for rounds


def open_ring(comm: Any, timeout: float | None) -> Ring:
    """The ring of all ranks of `comm`, or of the whole job; see `ringattn.init`."""
    MPI = _load()
    if comm is None:
        comm = MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm):
        raise ArgumentTypeError(f"comm: {type(comm).__name__}, expected an mpi4py intracommunicator")
    ring = MpiRing(MPI, comm, introduce(timeout, comm.allgather))
    ring.find_gpus()
    return ring


def _load() -> Any:
    MPI = load_mpi()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RingError(
            "MPI was started without support for threads; import ringattn before anything that starts MPI, leave "
            "mpi4py.rc.thread_level at 'multiple', or use an MPI built with MPI_THREAD_MULTIPLE"
        )
    return MPI


class MpiRing(ProcessRing):
    """A ring of MPI processes. It has two communicators of its own: one for data, one for control messages."""

    backend = "mpi"

    def __init__(self, MPI: Any, comm: Any, members: Sequence[Member]):
        self._MPI = MPI
        self._comm = comm.Dup()
        self._control_comm = comm.Dup()
        self._library_errors = (MPI.Exception,)
        for own in (self._comm, self._control_comm):
            own.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns a returned error into an exception
        super().__init__(MpiControlChannel(self._control_comm, MPI.Status()), comm.Get_rank(), members)
        # Each rank begins with its right neighbour, so that they do not all send to the same one first.
        self._peers = [(self.rank + shift) % self.size for shift in range(1, self.size)]
        self._status = MPI.Status()
        self._stuck = False  # the main thread is in an MPI call that only the end of the job can interrupt
        post_send = lambda data, peer, tag: self._comm.Isend([data, MPI.BYTE], peer, FIRST_TAG + tag)  # noqa: E731
        post_recv = lambda data, peer, tag: self._comm.Irecv([data, MPI.BYTE], peer, FIRST_TAG + tag)  # noqa: E731
        self._links: DeviceLinks | None = None
        self._links_timer = StallTimer(self._interval)
        self._engine = MessageEngine(post_send, post_recv, MPI.Status, MPI.BYTE, self._moved, self._life.seen)
        self._progress = ProgressThread(self._engine, self._beat, self._beat_interval, self.fail, lambda: self.retired)
        shutdown.register_ring(self)

    def find_gpus(self) -> None:
        """Find out whether blocks can travel from GPU to GPU. Collective."""
        self.has_gpus = self.size > 1 and agree_on_gpus(self)

    # What users call

    def split(self, color: int | None) -> Transport | None:
        with self.call("split"):
            with raise_on_all_ranks(self, "split"):
                color = collectives.check_color(color)
            replies = agree(self, "split", payload=[memoryview(json.dumps(color).encode())])
            colors = [json.loads(bytes(reply)) for reply in replies]
            with self.break_ring_on_error():
                ordered = sorted({c for c in colors if c is not None})  # MPI's colours are small and not negative
                mine = self._MPI.UNDEFINED if color is None else ordered.index(color)
                self._stuck = True
                comm = self._comm.Split(mine, self.rank)
                ring = None
                if color is not None:
                    ring = MpiRing(self._MPI, comm, [m for m, own in zip(self._members, colors) if own == color])
                    if self._guarded_thread is not None:
                        ring._report_to(self, [rank for rank, own in enumerate(colors) if own == color])
                    comm.Free()  # the new ring has its own duplicates
                    ring.tracer = self.tracer
                self._stuck = False
                if ring is not None:
                    ring.find_gpus()
                return ring

    # What the library calls

    def exchange(self, payload: Buffers) -> list[memoryview]:
        self._check()
        round_ = Round(self._comm, self._status, self.rank, self._peers, payload, self._life.seen)
        self._wait_until(round_.poll, lambda: round_.missing)
        self._life.set_all_places(self._place)
        return round_.replies

    def _swap(self, out: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        self._check()
        swap = Swap(self._comm, self._peers, out, into, self._life.seen)
        self._wait_until(swap.poll, lambda: swap.missing, bulk=True)

    def _share(self, own: memoryview, into: Sequence[memoryview]) -> None:
        self._swap([own] * self.size, into)

    def send(
        self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1
    ) -> Transfer:
        return self._add(Message("send", (self.rank + step) % self.size, tag, load, after))

    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        return self._add(Message("recv", (self.rank - step) % self.size, tag, lambda: buffers, after))

    def _add(self, message: Message) -> Message:
        self._check()
        for signal in message.after:
            if isinstance(signal, Signal):
                signal.watch(self._progress.wake)
        self._engine.add(message)
        try:
            self._engine.step(wait=False)  # starts it at once if possible: waking the helper takes longer
        except BaseException as error:
            self.fail(error)
            raise
        self._progress.wake()
        return message

    def _moved(self, message: Message | DeviceMessage) -> None:
        if message.kind == "send":
            self.bytes_sent += message.bytes
        if message.bytes:
            self.tracer.add(message.kind, message.tag, message.started, time.time(), message.bytes)

    def wait(self, *transfers: Transfer) -> None:
        if all(transfer.done for transfer in transfers):
            return
        self._check()

        def poll() -> bool:
            self._engine.step()
            if self._links is not None:
                self._links.advance()
            return all(transfer.done for transfer in transfers)

        self._progress.main_thread_polls = True
        try:
            self._wait_until(poll, self._peers_of_messages, bulk=True)
        finally:
            self._progress.main_thread_polls = False
            self._progress.wake()

    def _peers_of_messages(self) -> set[int]:
        return self._engine.peers if self._links is None else self._engine.peers | self._links.peers

    @property
    def links(self) -> DeviceLinks | None:
        return self._links

    def connect_gpus(self) -> DeviceLinks:
        if self._links is None:
            self._check()
            network = connect(self, lambda poll: self._wait_until(poll, set))
            self._links = DeviceLinks(self.rank, self.size, network, self._moved)
        return self._links

    def _abort_links(self) -> None:
        if self._links is not None:
            self._links.abort()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._progress.broken = True
        self._abort_links()

    # What failures/shutdown.py calls

    def free(self) -> None:
        """Free the communicators of a retired ring, because MPI has few."""
        self._abort_links()
        self._progress.join()
        self._comm.Free()
        self._control_comm.Free()

    def abort(self) -> None:
        """End all processes of the job."""
        self._comm.Abort(self.exit_code)

    @property
    def _cause_wait(self) -> float:
        """MPI does not report the end of a rank: another rank's death shows only in its missing heartbeats."""
        return 0.0 if self._guarded_thread is None else self.timeout + 2 * self._interval

    def _in_flight_with(self, peer: int) -> list[list]:
        on_gpus = [] if self._links is None else self._links.oldest_with(peer)
        return self._engine.in_flight_with(peer) + on_gpus

    def _beat_interval(self) -> float:
        """Seconds between two heartbeats; few once a ring is broken whose main thread may not notice."""
        return min(self._interval, 0.1) if self.broken and self._guarded_thread is not None else self._interval

    def _beat(self) -> None:
        self._life.beat()
        self._check_links(self._engine.moving(self._life.moving), self._engine.rate)
        if self._links is not None:
            self._check_links(self._links.moving(self._life.moving), self._links.rate, timer=self._links_timer)
            if self.broken:  # the main thread may wait for the GPU
                self._links.abort()
        overdue = self._broken_for() > ABORT_AFTER and self._guarded_thread is not None and not self._noticed
        if self.broken and (self._stuck or overdue):
            shutdown.abort_from_helper(self)

    def _wait_until(self, poll: Callable[[], bool], missing: Callable[[], set[int]], bulk: bool = False) -> None:
        """Wait until `poll` returns ``True``; `missing` returns the ranks for which it waits."""
        with self._breaking():
            wait_until(poll, self._peer_check(missing), bulk)
