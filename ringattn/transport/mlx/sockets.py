"""Small messages over ordinary TCP sockets, one between every two ranks: a switchboard for several uses at a time.

A message has a channel (whom it is for), a kind and a note. Sending never waits: what the socket does not take at once
leaves when `pump` is called, which one thread does for ever. Messages of one rank arrive in order.
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
_LONGEST = 1 << 20  # bytes of a note; whoever claims to send more is no rank of ours

Deliver = Callable[[int, int, int, bytes], None]  # sender, channel, kind, note


class Switchboard:
    """All of a rank's sockets.

    Args:
        sockets: A connected socket for every other rank.
        deliver: Called by `pump` with every message that has come.
        lost: Called by `pump` with a rank whose connection has ended, once, after all its messages.
    """

    def __init__(self, sockets: Mapping[int, socket.socket], deliver: Deliver, lost: Callable[[int], None]):
        self._deliver, self._lost = deliver, lost
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._lines = {peer: _Line(peer, sock) for peer, sock in sockets.items()}
        for line in self._lines.values():
            self._selector.register(line.sock, selectors.EVENT_READ, line)

    def send(self, peer: int, channel: int, kind: int, note: bytes) -> Sent:
        """Begin to send; to a rank that is gone it goes nowhere."""
        line = self._lines[peer]
        sent, whole = line.send(_HEAD.pack(len(note), channel, kind) + note)
        if not whole:
            self.ring_bell()  # `pump` has to wait for the socket to become writable
        return sent

    def ring_bell(self) -> None:
        """Have `pump` return."""
        with suppress(BlockingIOError):
            self._bell.send(b"!")

    def pump(self, timeout: float) -> None:
        """Move what can be moved, for at most `timeout` seconds if that is nothing."""
        for line in self._lines.values():
            if line.open:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.waiting else 0)
                if self._selector.get_key(line.sock).events != events:
                    self._selector.modify(line.sock, events, line)
        for key, events in self._selector.select(timeout):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._ear.recv(4096)
                continue
            if events & selectors.EVENT_WRITE:
                key.data.flush()
            if events & selectors.EVENT_READ:
                self._read(key.data)

    def _read(self, line: _Line) -> None:
        messages, alive = line.read()
        for channel, kind, note in messages:
            self._deliver(line.peer, channel, kind, note)
        if not alive:
            self._selector.unregister(line.sock)
            line.close()
            self._lost(line.peer)


class _Line:
    """The socket to one rank."""

    def __init__(self, peer: int, sock: socket.socket):
        self.peer, self.sock, self.open = peer, sock, True
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._out, self._in = bytearray(), bytearray()
        self._given = self._gone = 0  # bytes: all that were to be sent, and those that have left
        self._lock = threading.Lock()

    @property
    def waiting(self) -> bool:
        return bool(self._out)

    def send(self, message: bytes) -> tuple[Sent, bool]:
        """Begin to send; what says whether it has left, and whether all has left already."""
        with self._lock:
            if not self.open:
                return (lambda: True), True
            self._given += len(message)
            goal = self._given
            self._out += message
            self._flush()
            return (lambda: self._gone >= goal or not self.open), not self._out

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out and self.open:
                count = self.sock.send(self._out)
                self._gone += count
                del self._out[:count]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._out.clear()  # the other end is gone, which reading will tell

    def read(self) -> tuple[list[tuple[int, int, bytes]], bool]:
        """What has come, and whether more may come."""
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
