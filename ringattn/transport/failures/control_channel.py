"""Small messages between any two ranks, beside the blocks: what `Liveness` needs of a transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

BEAT, BYE, FAIL, LOST = 1, 2, 3, 4  # kinds of message; nobody sends the last one: the connection to the rank was lost

Sent = Callable[[], bool]  # whether a message has left


class Post(Protocol):
    """Messages arrive in the order in which a rank sent them."""

    def send(self, peer: int, kind: int, note: bytes) -> Sent:
        """Begin to send; never waits, whatever the peer does."""

    def take(self) -> tuple[int, int, bytes] | None:
        """The next message that has come: its sender, kind and note; ``None`` if there is none."""


class MpiPost:
    """Post over an MPI communicator of its own.

    Nothing is posted in advance (messages are probed for), so nothing has to be cancelled when a process ends.
    """

    def __init__(self, comm: Any, status: Any):
        self._comm, self._status = comm, status

    def send(self, peer: int, kind: int, note: bytes) -> Sent:
        request = self._comm.Isend(note, peer, kind)

        def left(alive: bytes = note) -> bool:  # MPI does not keep the memory alive
            done: bool = request.Test()
            return done

        return left

    def take(self) -> tuple[int, int, bytes] | None:
        message = self._comm.Improbe(status=self._status)
        if message is None:
            return None
        sender, kind = self._status.Get_source(), self._status.Get_tag()
        note = bytearray(self._status.Get_count())
        message.Recv(note)
        return sender, kind, bytes(note)
