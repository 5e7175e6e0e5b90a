"""The listening socket: bounded connections, and deadlines for clients that are slow."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

from .api.fields import RequestError
from .api.responses import error_object

BACKLOG = 256  # connections that the system keeps until they are accepted
MOST_CONNECTIONS = 256  # threads
LINGER = 2.0  # s in which a client may take its answer before the connection is closed
_BUSY = RequestError(503, f"{MOST_CONNECTIONS} connections are open, try again later", code="overloaded")


class DeadlineReader(io.RawIOBase):
    """Bytes from a connection until a deadline, by `time.monotonic`. Raises TimeoutError after it."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """A thread for each connection, and a bound on their number."""

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, *args: Any, **options: Any):
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it at once."""
        if not self._places.acquire(blocking=False):
            _turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._places.release()
            _turn_away(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection when the client has its answer.

        Closing while bytes of the client are unread would reset the connection, and the answer could be lost.
        """
        deadline = time.monotonic() + LINGER
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                request.settimeout(left)
                if not request.recv(1 << 16):
                    break
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what went wrong with a connection; clients that leave are no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"{client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr)


def _turn_away(connection: socket.socket) -> None:
    """Answer 503 without waiting for anything."""
    body = json.dumps(error_object(_BUSY)).encode()
    head = "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: "
    with suppress(OSError):
        connection.setblocking(False)
        connection.send(f"{head}{len(body)}\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1 << 16)
    connection.close()
