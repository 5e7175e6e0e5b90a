"""The transport over MPI, through mpi4py. MPI starts when a ring is opened, not when this is imported."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import ArgumentError, ArgumentTypeError, RingError
from . import collectives, leaving, read_timeout
from .agreement import agree, heard
from .base import Buffers, Event, Gate, Ring, Transfer
from .liveness import GRACE, Liveness, Place, describe
from .pace import wait_until
from .progress import Engine, Helper, Message
from .rounds import Round, Swap
from .status import status

FIRST_TAG = 16  # MPI tag of message 0; those below are for rounds


def open_ring(comm: Any, timeout: float | None) -> Ring:
    """The ring of all ranks of `comm`, or of the whole job; see `ringattn.init`."""
    MPI = _load()
    if comm is None:
        comm = MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm):
        raise ArgumentTypeError(f"comm: {type(comm).__name__}, expected an mpi4py intracommunicator")
    error: ArgumentError | None = None
    try:
        timeout = read_timeout(timeout)
    except ArgumentError as wrong:
        error = wrong
    # One round before anything else, so that an argument that is wrong on one rank is an error on all.
    told = comm.allgather((platform.node(), timeout, None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (_, _, text) in enumerate(told):
        if text is not None:
            raise ArgumentError(f"rank {rank}: {text}")
    return MpiRing(MPI, comm, tuple(host for host, _, _ in told), [seconds for _, seconds, _ in told])


def _load() -> Any:
    MPI = _import()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RingError(
            "MPI was started without support for threads; import ringattn before anything that starts MPI, leave "
            "mpi4py.rc.thread_level at 'multiple', or use an MPI built with MPI_THREAD_MULTIPLE"
        )
    return MPI


def _import() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py itself is missing, or it found no MPI library
        why = str(error).partition("\n")[0]
        raise RingError(f"backend 'mpi' needs mpi4py and MPI ({why}): pip install 'ringattn[mpi]'") from error
    return MPI


class Library(NamedTuple):
    """The MPI library of this process."""

    version: str  # in its own words
    flavour: str  # "MPICH", "Open MPI" or another
    threads: str  # the level of support: "single", "funneled", "serialized" or "multiple", which rings need
    size: int  # processes of the job


def library() -> Library:
    """What MPI this process runs with; starts MPI. `RingError` where there is none."""
    MPI = _import()
    levels = ("single", "funneled", "serialized", "multiple")
    known = {getattr(MPI, f"THREAD_{name.upper()}"): name for name in levels}
    version = " ".join(MPI.Get_library_version().partition("\n")[0].split())
    return Library(version.rstrip("\0"), MPI.get_vendor()[0], known[MPI.Query_thread()], MPI.COMM_WORLD.Get_size())


class MpiRing(Ring):
    """A ring of MPI processes. It has two communicators of its own: one for data, one for signs of life."""

    def __init__(self, MPI: Any, comm: Any, hosts: tuple[str, ...], timeouts: list[float]):
        super().__init__()
        self._MPI, self._comm, self._life_comm = MPI, comm.Dup(), comm.Dup()
        for own in (self._comm, self._life_comm):
            own.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns what is returned into exceptions
        self.rank, self.size, self.hosts = comm.Get_rank(), comm.Get_size(), hosts
        # Each rank begins with its right neighbour, so that they do not all send to the same one first.
        self._peers = [(self.rank + shift) % self.size for shift in range(1, self.size)]
        self._timeouts = timeouts
        self.timeout = timeouts[self.rank]
        self._place: Place = ("", 0)
        self._status = MPI.Status()
        self._closed = False
        self._stuck = False  # the main thread is in an MPI call that only the end of the job can interrupt
        interval = min(1.0, min(timeouts) / 10)  # often enough for the most impatient rank
        self._life = Liveness(self._life_comm, hosts, self.timeout, interval, lambda: self._place, MPI.Status())
        post_send = lambda data, peer, tag: self._comm.Isend([data, MPI.BYTE], peer, FIRST_TAG + tag)  # noqa: E731
        post_recv = lambda data, peer, tag: self._comm.Irecv([data, MPI.BYTE], peer, FIRST_TAG + tag)  # noqa: E731
        self._engine = Engine(post_send, post_recv, MPI.Status, MPI.BYTE, self._moved)
        self._helper = Helper(self._engine, self._beat, interval, self.fail, lambda: self.retired)
        status.open(self.rank, self.size)
        leaving.watch_over(self)

    # What users call

    def split(self, color: int | None) -> Ring | None:
        with self.call("split"):
            with heard(self, "split"):
                color = collectives.check_color(color)
            told = agree(self, "split", payload=[memoryview(json.dumps(color).encode())])
            colors = [json.loads(bytes(reply)) for reply in told]
            with self.committed():
                ordered = sorted({c for c in colors if c is not None})  # MPI's colours are small and not negative
                mine = self._MPI.UNDEFINED if color is None else ordered.index(color)
                self._stuck = True
                comm = self._comm.Split(mine, self.rank)
                ring = None
                if color is not None:
                    ranks = [rank for rank in range(self.size) if colors[rank] == color]
                    hosts = tuple(self.hosts[rank] for rank in ranks)
                    ring = MpiRing(self._MPI, comm, hosts, [self._timeouts[rank] for rank in ranks])
                    comm.Free()  # the new ring has its own duplicates
                self._stuck = False
                return ring

    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        with self.call("broadcast"):
            return collectives.broadcast(self, x, root)

    def all_reduce(self, x: mx.array) -> mx.array:
        with self.call("all_reduce"):
            return collectives.all_reduce(self, x, self._swap)

    def barrier(self) -> None:
        with self.call("barrier"):
            agree(self, "barrier")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._life.say_bye(patience=1.0)

    # What the library calls

    def exchange(self, payload: Buffers) -> list[memoryview]:
        self._check()
        round_ = Round(self._comm, self._status, self.rank, self._peers, payload)
        self._watch(round_.poll, lambda: round_.missing)
        return round_.replies

    def _swap(self, out: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        self._check()
        swap = Swap(self._comm, self._peers, out, into)
        self._watch(swap.poll, lambda: swap.missing, bulk=True)

    def send(self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Gate] = ()) -> Transfer:
        return self._add(Message("send", (self.rank + 1) % self.size, tag, load, after))

    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Gate] = ()) -> Transfer:
        return self._add(Message("recv", (self.rank - 1) % self.size, tag, lambda: buffers, after))

    def _add(self, message: Message) -> Message:
        self._check()
        for gate in message.after:
            if isinstance(gate, Gate):
                gate.watch(self._helper.ring)
        self._engine.add(message)
        try:
            self._engine.step(wait=False)  # at once, if it can go: waking the helper takes longer
        except BaseException as error:
            self.fail(error)
            raise
        self._helper.ring()
        return message

    def _moved(self, message: Message) -> None:
        if message.kind == "send":
            self.bytes_sent += message.bytes
        if self.trace is not None and message.bytes:
            self.trace.append(Event(message.kind, message.tag, message.started, time.time(), message.bytes))

    def wait(self, *transfers: Transfer) -> None:
        if all(transfer.done for transfer in transfers):
            return
        self._check()

        def poll() -> bool:
            self._engine.step()
            return all(transfer.done for transfer in transfers)

        self._helper.relieved = True
        try:
            self._watch(poll, lambda: self._engine.peers, bulk=True)
        finally:
            self._helper.relieved = False
            self._helper.ring()

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, RingError) or error.rank is None:
            what, hop = self._place
            text = f"{self._life.name(self.rank)} failed {describe((what, hop))}: {type(error).__name__}: {error}"
            error = RingError(text, rank=self.rank, host=self.hosts[self.rank], hop=hop)
        self._life.fail(error)
        self._helper.broken = True

    def at(self, what: str, hop: int) -> None:
        if self._life.error is None:  # a broken ring stays where it broke
            self._place = (what, hop)
            status.write(what, hop)

    # What leaving.py asks

    @property
    def error(self) -> RingError | None:
        """What broke the ring."""
        return self._life.error

    @property
    def broken(self) -> bool:
        return self._life.error is not None

    @property
    def retired(self) -> bool:
        """Whether this ring is closed on all ranks, or on those that live."""
        return self._closed and self._life.everybody_left()

    @property
    def me(self) -> str:
        return self._life.name(self.rank)

    @property
    def where(self) -> str:
        return describe(self._place)

    def hear(self) -> None:
        """Take in what the others have said."""
        self._life.hear()

    def free(self) -> None:
        """Give a retired ring's communicators back, of which MPI has few."""
        self._helper.join()
        self._comm.Free()
        self._life_comm.Free()

    def abort(self) -> None:
        """End all processes of the job."""
        self._comm.Abort(1)

    def _beat(self) -> None:
        self._life.beat()
        if self.broken and self._stuck:
            leaving.abandon(self)

    # Waiting with open eyes

    def _check(self) -> None:
        if self._life.error is not None:
            raise self._life.error
        if self._closed:
            raise RingError("this ring is closed")

    def _watch(self, poll: Callable[[], bool], missing: Callable[[], set[int]], bulk: bool = False) -> None:
        """Wait until `poll` says True; `missing` are the ranks that this depends on."""
        since: dict[int, float] = {}  # when a rank that is missing was first seen to have left

        def look() -> None:
            self._life.hear()
            self._check()
            now = time.monotonic()
            for peer in missing() & self._life.left:
                # What it sent before it left may still be on the way.
                if now - since.setdefault(peer, now) > GRACE:
                    self._deserted(peer)

        try:
            wait_until(poll, look, bulk)
        except RingError as error:
            self.fail(error)
            raise
        except self._MPI.Exception as error:
            self.fail(error)
            self._check()
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def _deserted(self, peer: int) -> None:
        what, hop = self._place
        raise RingError(
            f"{self._life.name(peer)} left the ring while rank {self.rank} waited for it {describe((what, hop))}",
            rank=peer,
            host=self.hosts[peer],
            hop=hop,
        )
