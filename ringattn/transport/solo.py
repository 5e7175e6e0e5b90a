"""The ring of one process: no data moves, and everything else behaves as in a larger ring."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import mlx.core as mx

from ..errors import RingError
from . import collectives
from .consensus import agree, raise_on_all_ranks
from .failures.status_file import status
from .interface import Buffers, Signal, Transfer, Transport


class SoloRing(Transport):
    """A ring of one rank."""

    backend = "solo"

    def __init__(self, timeout: float):
        super().__init__()
        self.rank = 0
        self.size = 1
        self.hosts = (platform.node(),)
        self.timeout = timeout
        self._error: RingError | None = None
        status.opened(0, 1)

    def split(self, color: int | None) -> Transport | None:
        with self.call("split"):
            with raise_on_all_ranks(self, "split"):
                color = collectives.check_color(color)
            agree(self, "split")
            if color is None:
                return None
            ring = SoloRing(self.timeout)
            ring.tracer = self.tracer
            return ring

    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        with self.call("broadcast"):
            return collectives.broadcast(self, x, root)

    def all_reduce(self, x: mx.array) -> mx.array:
        with self.call("all_reduce"):
            return collectives.all_reduce(self, x, lambda out, into: None, lambda own, into: None)

    def barrier(self) -> None:
        with self.call("barrier"):
            agree(self, "barrier")

    def close(self) -> None:
        self.finish_trace()
        self._error = self._error or RingError("this ring is closed")

    def exchange(self, payload: Buffers) -> list[memoryview]:
        self._check()
        return [memoryview(b"".join(payload))]

    def send(
        self, load: Callable[[], Buffers], *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1
    ) -> Transfer:
        raise RingError("a ring of one rank has no neighbour to send to")

    def recv(self, buffers: Buffers, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        raise RingError("a ring of one rank has no neighbour to receive from")

    def wait(self, *transfers: Transfer) -> None:
        self._check()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or RingError(f"the ring broke: {type(error).__name__}: {error}", rank=0)

    def set_progress(self, what: str, hop: int) -> None:
        status.write(what, hop)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
