"""Small messages over ordinary TCP sockets, one socket between every two ranks, which several users share.

A message has a channel (its user), a kind and a note. A send never blocks: bytes that the socket does not take at once
leave in `process_events`, which one thread calls for ever. Messages of one rank arrive in order.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..failures.control_channel import Sent

_HEAD = struct.Struct("<IIB")  # bytes of the note, channel, kind
_LONGEST = 1 << 20  # bytes of a note; a sender that announces more is not a rank of this job

Deliver = Callable[[int, int, int, bytes], None]  # sender, channel, kind, note


class ControlSockets:
    """The sockets of a rank to all others.

    Args:
        sockets: A connected socket for every other rank.
        deliver: Called by `process_events` with every message that has arrived.
        lost: Called by `process_events` with a rank whose connection has ended, once, after all its messages.
    """

    def __init__(self, sockets: Mapping[int, socket.socket], deliver: Deliver, lost: Callable[[int], None]):
        self._deliver = deliver
        self._lost = lost
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._wake_receiver.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._connections = {peer: _Connection(peer, sock) for peer, sock in sockets.items()}
        for connection in self._connections.values():
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def send(self, peer: int, channel: int, kind: int, note: bytes) -> Sent:
        """Start to send a message. A message to a rank whose connection has ended is dropped."""
        sent, complete = self._connections[peer].send(_HEAD.pack(len(note), channel, kind) + note)
        if not complete:
            self.wake()  # `process_events` must wait until the socket is writable
        return sent

    def wake(self) -> None:
        """Let `process_events` return now."""
        with suppress(BlockingIOError):
            self._wake_sender.send(b"!")

    def process_events(self, timeout: float) -> None:
        """Send and receive everything that can move now; wait for at most `timeout` seconds if nothing can."""
        for connection in self._connections.values():
            if connection.open:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.waiting else 0)
                if self._selector.get_key(connection.sock).events != events:
                    self._selector.modify(connection.sock, events, connection)
        for key, events in self._selector.select(timeout):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._wake_receiver.recv(4096)
                continue
            if events & selectors.EVENT_WRITE:
                key.data.flush()
            if events & selectors.EVENT_READ:
                self._read(key.data)

    def _read(self, connection: _Connection) -> None:
        messages, alive = connection.read()
        for channel, kind, note in messages:
            self._deliver(connection.peer, channel, kind, note)
        if not alive:
            self._selector.unregister(connection.sock)
            connection.close()
            self._lost(connection.peer)


class _Connection:
    """The socket to one rank."""

    def __init__(self, peer: int, sock: socket.socket):
        self.peer = peer
        self.sock = sock
        self.open = True
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._out = bytearray()
        self._in = bytearray()
        self._bytes_accepted = 0  # in all calls of `send`
        self._bytes_sent = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> bool:
        """Whether bytes wait for the socket to become writable."""
        return bool(self._out)

    def send(self, message: bytes) -> tuple[Sent, bool]:
        """Start to send. Return a function that says whether the message has left, and whether nothing waits."""
        with self._lock:
            if not self.open:
                return (lambda: True), True
            self._bytes_accepted += len(message)
            goal = self._bytes_accepted
            self._out += message
            self._flush()
            return (lambda: self._bytes_sent >= goal or not self.open), not self._out

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out and self.open:
                count = self.sock.send(self._out)
                self._bytes_sent += count
                del self._out[:count]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._out.clear()  # the connection has ended, which the next read finds

    def read(self) -> tuple[list[tuple[int, int, bytes]], bool]:
        """Return the messages that have arrived, and whether the connection is still open."""
        alive = True
        try:
            data = self.sock.recv(1 << 16)
            alive = bool(data)
            self._in += data
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            alive = False
        messages: list[tuple[int, int, bytes]] = []
        while len(self._in) >= _HEAD.size:
            length, channel, kind = _HEAD.unpack_from(self._in)
            if length > _LONGEST:
                return messages, False
            if len(self._in) < _HEAD.size + length:
                break
            messages.append((channel, kind, bytes(self._in[_HEAD.size : _HEAD.size + length])))
            del self._in[: _HEAD.size + length]
        return messages, alive

    def close(self) -> None:
        with self._lock:
            self.open = False
            self._out.clear()
            self.sock.close()
