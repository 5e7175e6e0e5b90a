"""Rounds in which every rank sends bytes to every other one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..interface import Buffers
from . import progress

ROUND_TAG, SWAP_TAG = 0, 1


class Round:
    """A round in which every rank sends a payload to every other one. Only the sender knows its length.

    A payload travels as messages of `CHUNK_BYTES`; a shorter one is the last. The receiver probes for messages and
    posts no receive in advance, so that it gets messages of any length whole.
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
        self._comm = comm
        self._status = status
        self._on_arrival = on_arrival
        mine = payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
        pieces = [mine]
        if len(mine) >= progress.CHUNK_BYTES:
            starts = range(0, len(mine) + 1, progress.CHUNK_BYTES)
            pieces = [mine[start : start + progress.CHUNK_BYTES] for start in starts]
        self._sending = [(peer, comm.Isend(piece, peer, ROUND_TAG)) for peer in peers for piece in pieces]
        self._parts: dict[int, list[memoryview]] = {peer: [] for peer in peers}
        self._parts[rank] = [mine]
        self._expected = list(peers)  # ranks whose last message has not come
        self._arriving: list[tuple[int, Any]] = []

    def poll(self) -> bool:
        """Receive and send what is ready; whether all has arrived and left."""
        if self._expected:
            self._expected = [peer for peer in self._expected if not self._probe(peer)]
        if self._arriving:
            self._arriving = [(peer, request) for peer, request in self._arriving if not request.Test()]
        if self._expected or self._arriving:
            return False
        self._sending = [(peer, request) for peer, request in self._sending if not request.Test()]
        return not self._sending

    def _probe(self, peer: int) -> bool:
        """Begin to receive a message of `peer`; whether it is the last one."""
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
        """The ranks whose messages have not all passed."""
        return {*self._expected, *(peer for peer, _ in self._arriving + self._sending)}

    @property
    def replies(self) -> list[memoryview]:
        return [
            parts[0] if len(parts) == 1 else memoryview(b"".join(parts)) for _, parts in sorted(self._parts.items())
        ]


class Swap:
    """A round of slices whose lengths both sides know: `out[i]` goes to rank i, which fills `into[i]`."""

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
        self._alive = (out, into)  # MPI does not keep the memory alive
        self._on_arrival = on_arrival

    def poll(self) -> bool:
        """Receive and send what is ready; whether all is done."""
        arrived = [(peer, request) for peer, request in self._coming if request.Test()]
        for one in arrived:
            self._on_arrival(one[0])
            self._coming.remove(one)
        self._leaving = [(peer, request) for peer, request in self._leaving if not request.Test()]
        return not (self._coming or self._leaving)

    @property
    def missing(self) -> set[int]:
        """The ranks whose messages have not all passed."""
        return {peer for peer, _ in self._coming + self._leaving}
