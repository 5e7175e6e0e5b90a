"""Control messages: small messages between any two ranks, which travel beside the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

BEAT, BYE, FAIL, LOST = 1, 2, 3, 4  # kinds of message; no rank sends LOST: the connection to the rank was lost

Sent = Callable[[], bool]  # whether a message has left


class ControlChannel(Protocol):
    """A way for small messages. They arrive in the order in which a rank sends them."""

    def send(self, peer: int, kind: int, note: bytes) -> Sent:
        """Begin to send. Never wait, whatever the peer does."""

    def take(self) -> tuple[int, int, bytes] | None:
        """The next message that has arrived: its sender, kind and note; ``None`` if there is none."""


class MpiControlChannel:
    """A control channel over an MPI communicator of its own.

    It probes for messages and posts no receive in advance, so none has to be cancelled when a process ends.
    """

    def __init__(self, comm: Any, status: Any):
        self._comm = comm
        self._status = status

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
        sender = self._status.Get_source()
        kind = self._status.Get_tag()
        note = bytearray(self._status.Get_count())
        message.Recv(note)
        return sender, kind, bytes(note)
