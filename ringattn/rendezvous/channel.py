"""Messages over a connection whose other side has proved its identity: four bytes of length, then JSON.

The length is limited, and a message that is no JSON raises an error: the other side is trusted, but may be another
version, or broken.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, TypeVar

MESSAGE_BYTES = 1 << 16
_UNSENT_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_LENGTH = struct.Struct("!I")

T = TypeVar("T")


class ProtocolError(ConnectionError):
    """A message of the other side is not as the protocol requires."""


class Channel:
    """A channel for messages, which are JSON objects or lists, in both directions over one socket.

    If the socket blocks, so do `send` and `read`. If it does not, `send` keeps the bytes that the system does not
    accept, and `flush` sends them later.

    Args:
        link: The socket.
        most: The largest number of bytes of one message, in either direction.
    """

    def __init__(self, link: socket.socket, most: int = MESSAGE_BYTES) -> None:
        self._link = link
        self._most = most
        self._received = bytearray()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, for `select`."""
        return self._link.fileno()

    def send(self, message: object) -> None:
        """Send a message.

        Raises:
            ProtocolError: It is too long, or the other side does not read earlier messages.
            OSError: The connection has ended.
        """
        text = json.dumps(message).encode()
        if len(text) > self._most or len(self._unsent) > _UNSENT_BYTES:
            raise ProtocolError(
                f"message of {len(text)} bytes after {len(self._unsent)} that wait, expected at most {self._most}"
            )
        self._unsent += _LENGTH.pack(len(text)) + text
        self.flush()

    def flush(self) -> None:
        """Send waiting bytes, as many as the system accepts; `OSError` if the connection has ended."""
        try:
            while self._unsent:
                del self._unsent[: self._link.send(self._unsent)]
        except BlockingIOError:
            pass

    def read(self) -> bool:
        """Read received bytes once; false at the end of the connection.

        Raises:
            BlockingIOError: The socket does not block, and no byte has arrived.
            OSError: The connection has ended without having been closed.
        """
        part = self._link.recv(_READ_BYTES)
        self._received += part
        return bool(part)

    def next(self) -> Any:
        """Return the next message that has been read in full, ``None`` if there is none.

        Raises:
            ProtocolError: It is too long, or no message.
        """
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > self._most:
            raise ProtocolError(f"message of {length} bytes, expected at most {self._most}")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        text = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return _parse(text)

    def receive(self) -> Any:
        """Wait for the next message and return it; ``None`` at the end of the connection."""
        while (message := self.next()) is None:
            if not self.read():
                return None
        return message

    def close(self) -> None:
        self._link.close()


def take(message: Any, name: str, kind: type[T]) -> T:
    """Return the value of `name` in a message.

    Raises:
        ProtocolError: The message has no such value of exactly this type.
    """
    value = message.get(name) if isinstance(message, dict) else None
    if type(value) is not kind:
        raise ProtocolError(f"{name}: {type(value).__name__}, expected {kind.__name__}")
    return value


def _parse(text: bytes) -> Any:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ProtocolError(f"message that is not JSON: {type(error).__name__}") from None
    if not isinstance(message, (dict, list)):
        raise ProtocolError(f"message {text[:40]!r}, expected an object or a list")
    return message
