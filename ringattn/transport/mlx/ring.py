"""The transport over `mx.distributed`, under `mlx.launch`.

Blocks and gathers move over MLX's own links (TCP, or RDMA over Thunderbolt), heartbeats over ordinary TCP sockets.
`scheduler` explains how the two ends of a link agree on the next message, since `mx.distributed` has no tags, and why
no deadlock is possible.

A call into `mx.distributed` cannot be interrupted. Worker threads make these calls. So the main thread gets its
`RingError` when a rank dies, and the process ends without those threads. The exception is a gather that is a node of
MLX's graph: it runs on the thread that evaluates the graph. If the ring breaks meanwhile, the process prints the cause
and ends.
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
from ..base import Ring
from ..consensus import agree, raise_on_all_ranks
from ..environment import read_timeout
from ..failures import shutdown
from ..failures.bandwidth import LinkRate
from ..failures.heartbeats import Member
from ..failures.stall_timer import Moving
from ..handshake import introduce
from ..interface import Buffers, Signal, Transfer, Transport
from ..process_ring import ABORT_AFTER, ProcessRing
from ..solo import SoloRing
from .all_gather import INLINE_BYTES
from .backend import launched_size
from .matching import PendingMessage
from .process import ProcessLinks, process_links
from .scheduler import Wait

_CHECKED_BYTES = 512  # of each rank's payload in a gather in the graph: its head, and the start of an error's text


def open_ring(timeout: float | None) -> Ring:
    """Open the ring of all processes that `mlx.launch` started; see `ringattn.init`."""
    if launched_size() == 1:
        return SoloRing(read_timeout(timeout))
    links = process_links()
    return MlxRing(links, introduce(timeout, links.exchange_json))


class MlxRing(ProcessRing):
    """A ring of the processes of `mx.distributed`."""

    backend = "mlx"
    in_graph_bytes = INLINE_BYTES
    _library_errors = (RuntimeError,)

    def __init__(self, links: ProcessLinks, members: Sequence[Member]):
        self._links = links
        self._scheduler = links.scheduler
        self._channel = links.new_channel()
        super().__init__(links.control_channel(self._channel), links.rank, members)
        self._unchecked: deque[tuple[mx.array, Callable[[list[memoryview]], object]]] = deque()
        self.duplex = self._scheduler.group.duplex
        self._rate = LinkRate()
        links.add_ring(self._channel, self)
        shutdown.register_ring(self)

    # Called by users

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
                self.check_pending()  # other ranks may need this one for the gathers in MLX's graph
            self.finish_trace()
        finally:
            self._scheduler.announce_finished_epoch()
            super().close()

    # Called by the library

    def exchange(self, payload: Buffers) -> list[memoryview]:
        self._check()
        with self._breaking():
            replies = self._scheduler.exchange(self._channel, payload, self._wait_for(self._scheduler.gather_peers))
        self._life.set_all_places(self._place)
        return replies

    def exchange_in_graph(self, payload: mx.array, check: Callable[[list[memoryview]], object]) -> mx.array:
        self._check()
        with self._breaking():
            wait = self._wait_for(self._scheduler.gather_peers)
            replies = self._scheduler.exchange_in_graph(self._channel, payload, wait)
        self._life.count_agreement()  # other ranks may take part by `exchange`; where they are is known later
        heads = mx.contiguous(replies[:, :_CHECKED_BYTES])
        self._unchecked.append((heads, check))
        return mx.depends([replies], [heads])[0]  # both are evaluated together, so the frames can be freed

    def check_pending(self, keep: int = 0) -> None:
        self._check()
        while len(self._unchecked) > keep:
            heads, check = self._unchecked.popleft()
            with self._breaking():
                mx.eval(heads)
            check([memoryview(row) for row in np.array(heads)])

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
        message = PendingMessage(sending, peer, (self._channel, tag), load, after, self._on_message_done)
        for signal in after:
            if isinstance(signal, Signal):
                signal.watch(self._scheduler.advance)
        with self._breaking():
            self._scheduler.add(message)
        self._check()
        return message

    def _on_message_done(self, message: PendingMessage) -> None:
        self._rate.learn(message.bytes, time.time() - message.started)
        if message.sending:
            self.bytes_sent += message.bytes
        if message.bytes:
            kind = "send" if message.sending else "recv"
            self.tracer.add(kind, message.key[1], message.started, time.time(), message.bytes)

    def wait(self, *transfers: Transfer) -> None:
        if all(transfer.done for transfer in transfers):
            return
        self._check()
        with self._breaking():
            wait = self._wait_for(lambda: self._scheduler.message_peers(self._channel))
            wait(lambda: all(transfer.done for transfer in transfers))

    def _wait_for(self, peers: Callable[[], set[int]]) -> Wait:
        """Return a wait that raises when one of `peers` breaks the ring or leaves it."""
        check = self._peer_check(peers)
        return lambda condition: self._scheduler.wait(condition, check)

    # Called by the thread of `ProcessLinks`

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats; few once the ring is broken."""
        return self._interval if self._broken_since is None else min(self._interval, 0.1)

    def beat(self) -> None:
        """Send heartbeats, judge peers and links, and end a process that cannot end by itself."""
        self._life.beat()
        self._scheduler.announce_epoch()
        self._check_all_links()
        if not self.broken:
            return
        if self._broken_for() > ABORT_AFTER and self._scheduler.pending:
            shutdown.abort_from_helper(self)

    def _check_all_links(self) -> None:
        """Break the ring if a transfer that all its ends have started is stuck. Heartbeats go another way."""
        messages = [Moving(m, m.sending, m.peer, m.bytes) for m in self._scheduler.moving(self._channel)]
        gather = self._scheduler.gather_moving
        ages = self._check_links(messages, self._rate, [] if gather is None else [gather])
        if gather is not None and ages[gather] > self._rate.deadline(0, self.timeout):
            raise RingError(f"a round is stuck: all ranks have been in it for {self.timeout:g} s; look at the cables")

    # Called by `shutdown`

    def free(self) -> None:
        self._links.remove_ring(self._channel)

    def abort(self) -> None:
        """End this process at once. A normal exit would wait for ever for threads that are in `mx.distributed`."""
        os._exit(self.exit_code)
