"""A listener for callers that prove that they know a key, whatever strangers do at the same port."""

from __future__ import annotations

import errno
import hmac
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from .client import Address
from .handshake import (
    CHALLENGE,
    GREETING,
    HANDSHAKE_SECONDS,
    REFUSED,
    RESPONSE,
    caller_proof,
    listener_proof,
    make_nonce,
)

MOST_PENDING = 64  # connections in their handshake; a process on a Mac may have 256 descriptors in all
BACKLOG = 128
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 0.02  # s after the system had no descriptor left


@dataclass
class _Handshake:
    """The listener's side of one handshake."""

    link: socket.socket
    nonce: bytes
    deadline: float
    received: bytes = b""


class Listener:
    """A listening socket at each of `addresses`, and a thread that does all handshakes at once.

    A caller gets `HANDSHAKE_SECONDS` for the whole handshake. When more than `MOST_PENDING` are under way, the oldest
    is dropped; a caller with the key connects again.

    Args:
        addresses: Addresses of this machine; ``""`` is all of them. Each gets a port that the system chooses.
        find_key: Returns the key of the caller with this rank. ``None``: no key yet; the caller connects again.

    Attributes:
        addresses: The addresses and ports at which it listens.

    Raises:
        OSError: The system does not allow to listen at an address.
    """

    def __init__(self, addresses: Sequence[str], find_key: Callable[[int], bytes | None]) -> None:
        self._find_key = find_key
        self._selector = selectors.DefaultSelector()
        self._pending: dict[socket.socket, _Handshake] = {}  # the oldest first
        self._accepted: queue.SimpleQueue[tuple[int, socket.socket] | None] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._listening = [socket.create_server((address, 0), backlog=BACKLOG) for address in addresses]
        for listening in self._listening:
            listening.setblocking(False)
            self._selector.register(listening, selectors.EVENT_READ, partial(self._greet, listening))
        self.addresses: list[Address] = [listening.getsockname()[:2] for listening in self._listening]
        self._thread = threading.Thread(target=self._run, name="ringattn rendezvous", daemon=True)
        self._thread.start()

    def accept(self, timeout: float | None = None) -> tuple[int, socket.socket] | None:
        """Return the rank of a caller that knows the key, and the connection to it, which is blocking.

        Args:
            timeout: Seconds to wait for one; ``None`` waits until the listener is closed.

        Returns:
            ``None`` if no caller has come, or the listener is closed.
        """
        try:
            return self._accepted.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Stop listening. Connections that `accept` has returned stay open."""
        self._waker.close()
        self._thread.join()
        while caller := self.accept(0):
            caller[1].close()
        self._accepted.put(None)  # for a thread that waits

    # The thread

    def _run(self) -> None:
        while not self._woken_by(self._selector.select(self._next_deadline())):
            self._expire()
        for link in [*self._pending, *self._listening, self._woken]:
            link.close()
        self._selector.close()

    def _woken_by(self, events: list[tuple[selectors.SelectorKey, int]]) -> bool:
        """Handle events; whether `close` was called."""
        for key, _ in events:
            if key.data is None:
                return True
            key.data()
        return False

    def _greet(self, listening: socket.socket) -> None:
        """Accept a connection and begin its handshake."""
        try:
            link = listening.accept()[0]
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._drop_oldest()
                time.sleep(_PAUSE)
            return
        link.setblocking(False)
        handshake = _Handshake(link, make_nonce(), time.monotonic() + HANDSHAKE_SECONDS)
        self._pending[link] = handshake
        self._selector.register(link, selectors.EVENT_READ, partial(self._advance, handshake))
        if len(self._pending) > MOST_PENDING:
            self._drop_oldest()
        with suppress(OSError):  # the caller is gone, which the next read shows
            link.send(CHALLENGE.pack(GREETING, handshake.nonce))

    def _advance(self, handshake: _Handshake) -> None:
        """Read; accept or refuse the caller once its response is complete."""
        link = handshake.link
        try:
            part = link.recv(RESPONSE.size - len(handshake.received))
            handshake.received += part
            if not part:
                self._drop(link)
            elif len(handshake.received) == RESPONSE.size:
                self._decide(handshake)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(link)

    def _decide(self, handshake: _Handshake) -> None:
        rank, nonce, proof = RESPONSE.unpack(handshake.received)
        link = handshake.link
        key = self._find_key(rank)
        if key is None:
            self._drop(link)
            return
        if not hmac.compare_digest(proof, caller_proof(key, rank, handshake.nonce, nonce)):
            link.send(REFUSED)
            self._drop(link)
            return
        link.send(listener_proof(key, rank, handshake.nonce, nonce))
        del self._pending[link]
        self._selector.unregister(link)
        link.setblocking(True)
        self._accepted.put((rank, link))

    def _next_deadline(self) -> float | None:
        """Seconds until the oldest handshake expires; ``None`` if there is none."""
        oldest = next(iter(self._pending.values()), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic())

    def _expire(self) -> None:
        now = time.monotonic()
        for handshake in list(self._pending.values()):
            if handshake.deadline > now:
                return
            self._drop(handshake.link)

    def _drop_oldest(self) -> None:
        if oldest := next(iter(self._pending), None):
            self._drop(oldest)

    def _drop(self, link: socket.socket) -> None:
        if self._pending.pop(link, None):
            self._selector.unregister(link)
            link.close()
