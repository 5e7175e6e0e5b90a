"""The transport over `mx.distributed`, under `mlx.launch`.

Blocks and rounds move over MLX's own links (TCP, or RDMA over Thunderbolt), signs of life over ordinary TCP sockets.
`fabric` says how the two ends of a link agree what moves next although `mx.distributed` knows no tags, and why nothing
waits for ever.

A call into `mx.distributed` cannot be interrupted. They are made on threads of their own, so the main thread gets its
`RingError` when a rank dies, and the process ends without them. Only gathers that are nodes of MLX's graph are
evaluated by whoever evaluates the graph: if the ring breaks meanwhile, the process says why and ends.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ...errors import RingError
from .. import collectives
from ..base import Event, Ring
from ..consensus import agree, raise_on_all_ranks
from ..environment import read_timeout
from ..failures import shutdown
from ..failures.bandwidth import LinkRate
from ..failures.heartbeats import Member
from ..failures.stall_timer import Moving
from ..handshake import introduce
from ..interface import Buffers, Signal, Transfer, Transport
from ..process_ring import ProcessRing
from ..solo import SoloRing
from .all_gather import INLINE_BYTES
from .backend import launched_size
from .matching import Parcel
from .process import Hub, hub

_CHECKED_BYTES = 512  # of what a rank has sent in such a round: its head, and how an error begins
_LAST_WORDS = 1.0  # s in which the news of a death may arrive that explains why a message broke off
_STUCK_AFTER = 0.5  # s that the main thread has to notice by itself that the ring broke


def open_ring(timeout: float | None) -> Ring:
    """The ring of all processes that `mlx.launch` started; see `ringattn.init`."""
    if launched_size() == 1:
        return SoloRing(read_timeout(timeout))
    all_of_us = hub()
    return MlxRing(all_of_us, introduce(timeout, all_of_us.introduce))


class MlxRing(ProcessRing):
    """A ring of the processes of `mx.distributed`."""

    backend = "mlx"
    in_graph_bytes = INLINE_BYTES
    _library_errors = (RuntimeError,)

    def __init__(self, all_of_us: Hub, members: Sequence[Member]):
        self._hub, self._fabric = all_of_us, all_of_us.fabric
        self._channel = all_of_us.new_channel()
        super().__init__(all_of_us.post(self._channel), all_of_us.rank, members)
        self._unchecked: deque[tuple[mx.array, Callable[[list[memoryview]], object]]] = deque()
        self._broke: float | None = None  # when this was seen
        self.duplex = self._fabric.group.duplex
        self._rate = LinkRate()
        all_of_us.join(self._channel, self)
        shutdown.register_ring(self)

    # What users call

    def split(self, color: int | None) -> Transport | None:
        with self.call("split"):
            with raise_on_all_ranks(self, "split"):
                collectives.check_color(color)
            agree(self, "split")
            raise RingError("split: mx.distributed cannot divide its ranks; use backend 'mpi', under mpiexec")

    def close(self) -> None:
        if self._closed:
            return
        try:
            if not self.broken:
                self.check_pending()  # others may still need this rank for it
        finally:
            self._hub.say_how_far()
            super().close()

    # What the library calls

    def exchange(self, payload: Buffers) -> list[memoryview]:
        self._check()
        with self._breaking():
            replies = self._fabric.exchange(self._channel, payload, self._waiting(self._fabric.behind))
        self._life.set_all_places(self._place)
        return replies

    def exchange_in_graph(self, payload: mx.array, check: Callable[[list[memoryview]], object]) -> mx.array:
        self._check()
        with self._breaking():
            waiting = self._waiting(self._fabric.behind)
            replies = self._fabric.exchange_in_graph(self._channel, payload, waiting)
        begins = mx.contiguous(replies[:, :_CHECKED_BYTES])
        self._unchecked.append((begins, check))
        return mx.depends([replies], [begins])[0]  # so that both are evaluated, and the whole can go

    def check_pending(self, keep: int = 0) -> None:
        self._check()
        while len(self._unchecked) > keep:
            begins, check = self._unchecked.popleft()
            with self._breaking():
                mx.eval(begins)
            check([memoryview(row) for row in np.array(begins)])

    def _swap(self, out: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        collectives.swap_along(self, out, into)

    def _share(self, own: memoryview, into: Sequence[memoryview]) -> None:
        collectives.share_along(self, own, into)

    def send(
        self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1
    ) -> Transfer:
        return self._add(True, (self.rank + step) % self.size, tag, load, after)

    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        return self._add(False, (self.rank - step) % self.size, tag, lambda: buffers, after)

    def _add(
        self, sending: bool, peer: int, tag: int, load: Callable[[], Buffers], after: Sequence[Transfer | Signal]
    ) -> Transfer:
        self._check()
        parcel = Parcel(sending, peer, (self._channel, tag), load, after, self._moved)
        for signal in after:
            if isinstance(signal, Signal):
                signal.watch(self._fabric.advance)
        with self._breaking():
            self._fabric.add(parcel)
        self._check()
        return parcel

    def _moved(self, parcel: Parcel) -> None:
        self._rate.learn(parcel.bytes, time.time() - parcel.started)
        if parcel.sending:
            self.bytes_sent += parcel.bytes
        if self.trace is not None and parcel.bytes:
            kind = "send" if parcel.sending else "recv"
            self.trace.append(Event(kind, parcel.key[1], parcel.started, time.time(), parcel.bytes))

    def wait(self, *transfers: Transfer) -> None:
        if all(transfer.done for transfer in transfers):
            return
        self._check()
        with self._breaking():
            waiting = self._waiting(lambda: self._fabric.missing(self._channel))
            waiting(lambda: all(transfer.done for transfer in transfers))

    def await_cause(self, error: BaseException) -> None:
        if isinstance(error, RuntimeError) and str(error).startswith(("[ring]", "[jaccl]")):
            deadline = time.monotonic() + _LAST_WORDS
            while not self.broken and time.monotonic() < deadline:
                time.sleep(5e-3)
                self.process_messages()

    def _waiting(self, missing: Callable[[], set[int]]) -> Callable[[Callable[[], bool]], None]:
        look = self._peer_check(missing)
        return lambda poll: self._fabric.wait(poll, look)

    # What the hub's thread calls

    @property
    def interval(self) -> float:
        """Seconds until the next beat."""
        return self._interval if self._broke is None else min(self._interval, 0.1)

    def beat(self) -> None:
        """Tell the others that this rank lives, and end a process that cannot end by itself."""
        self._life.beat()
        self._fabric.say_where()
        self._judge_links()
        if not self.broken:
            return
        now = time.monotonic()
        self._broke = now if self._broke is None else self._broke
        if self._fabric.pending and now - self._broke > _STUCK_AFTER:
            shutdown.abort_from_helper(self)

    def _judge_links(self) -> None:
        """Break the ring when what both ends are moving does not arrive: signs of life go another way, and go on."""
        parcels = [Moving(p, p.sending, p.peer, p.bytes) for p in self._fabric.moving(self._channel)]
        gather = self._fabric.gather_moving
        ages = self._check_links(parcels, self._rate, [] if gather is None else [gather])
        if gather is not None and ages[gather] > self._rate.deadline(0, self.timeout):
            raise RingError(f"a round is stuck: all ranks have been in it for {self.timeout:g} s; look at the cables")

    # What failures/shutdown.py calls

    def free(self) -> None:
        self._hub.part(self._channel)

    def abort(self) -> None:
        """End this process at once: threads that are in `mx.distributed` would keep it for ever."""
        os._exit(self.exit_code)
