"""Rounds in which every rank sends something to every other one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..interface import Buffers
from . import progress

ROUND_TAG, SWAP_TAG = 0, 1


class Round:
    """Every rank's bytes to every other rank, of lengths that only the sender knows.

    A payload goes as messages of `CHUNK_BYTES`, of which the last is shorter, and so says that it is the last.
    Messages are probed for, never posted, so that a length that nobody expects is seen and not cut off.
    """

    def __init__(
        self,
        comm: Any,
        status: Any,
        rank: int,
        peers: Sequence[int],
        payload: Buffers,
        on_arrival: Callable[[int], None],
    ):
        self._comm, self._status, self._on_arrival = comm, status, on_arrival
        self._mine = mine = payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
        pieces = [mine]
        if len(mine) >= progress.CHUNK_BYTES:
            cuts = range(0, len(mine) + 1, progress.CHUNK_BYTES)
            pieces = [mine[at : at + progress.CHUNK_BYTES] for at in cuts]
        self._sending = [(peer, comm.Isend(piece, peer, ROUND_TAG)) for peer in peers for piece in pieces]
        self._parts: dict[int, list[memoryview]] = {peer: [] for peer in peers}
        self._parts[rank] = [mine]
        self._expected = list(peers)  # ranks whose last message has not been seen
        self._arriving: list[tuple[int, Any]] = []

    def poll(self) -> bool:
        """Move what can be moved; whether all has arrived and left."""
        if self._expected:
            self._expected = [peer for peer in self._expected if not self._probe(peer)]
        if self._arriving:
            self._arriving = [(peer, request) for peer, request in self._arriving if not request.Test()]
        if self._expected or self._arriving:
            return False
        self._sending = [(peer, request) for peer, request in self._sending if not request.Test()]
        return not self._sending

    def _probe(self, peer: int) -> bool:
        """Begin to receive what has come from `peer`; whether that was its last message."""
        message = self._comm.Improbe(peer, ROUND_TAG, self._status)
        if message is None:
            return False
        self._on_arrival(peer)
        part = memoryview(bytearray(self._status.Get_count()))
        self._parts[peer].append(part)
        request = message.Irecv(part)
        if not request.Test():
            self._arriving.append((peer, request))
        return len(part) < progress.CHUNK_BYTES

    @property
    def missing(self) -> set[int]:
        """The ranks that have something to do yet."""
        return {*self._expected, *(peer for peer, _ in self._arriving + self._sending)}

    @property
    def replies(self) -> list[memoryview]:
        return [
            parts[0] if len(parts) == 1 else memoryview(b"".join(parts)) for _, parts in sorted(self._parts.items())
        ]


class Swap:
    """Pieces of lengths that both sides know: `out[i]` goes to rank i, `into[i]` is filled by it."""

    def __init__(
        self,
        comm: Any,
        peers: Sequence[int],
        out: Sequence[memoryview],
        into: Sequence[memoryview],
        on_arrival: Callable[[int], None],
    ):
        self._coming = [(p, comm.Irecv(c, p, SWAP_TAG)) for p in peers for c in progress.chunks([into[p]])]
        self._leaving = [(p, comm.Isend(c, p, SWAP_TAG)) for p in peers for c in progress.chunks([out[p]])]
        self._alive, self._on_arrival = (out, into), on_arrival  # MPI does not keep the memory alive

    def poll(self) -> bool:
        """Move what can be moved; whether all is done."""
        arrived = [(peer, request) for peer, request in self._coming if request.Test()]
        for one in arrived:
            self._on_arrival(one[0])
            self._coming.remove(one)
        self._leaving = [(peer, request) for peer, request in self._leaving if not request.Test()]
        return not (self._coming or self._leaving)

    @property
    def missing(self) -> set[int]:
        """The ranks that have something to do yet."""
        return {peer for peer, _ in self._coming + self._leaving}
