"""The listening socket: a bound on connections, and deadlines for slow clients."""

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
LINGER = 2.0  # s for a client to take its answer before the connection is closed
_BUSY = RequestError(503, f"{MOST_CONNECTIONS} connections are open, try again later", code="overloaded")


class DeadlineReader(io.RawIOBase):
    """A reader of a connection that raises TimeoutError after a deadline, in `time.monotonic`'s seconds."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        """Whether bytes can be read, for `io`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the bytes that are there, for `io`."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request was not complete in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """A server with one thread for each connection, and a bound on their number."""

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, *args: Any, **options: Any):
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse the connection."""
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
        """Close a connection after the client has received its answer.

        Closing with unread bytes of the client would reset the connection, and the answer could be lost.
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
        """Print an error of a connection in one line; a client that leaves is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"{client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr)


def _turn_away(connection: socket.socket) -> None:
    """Send status 503 without waiting for the client."""
    body = json.dumps(error_object(_BUSY)).encode()
    head = "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: "
    with suppress(OSError):
        connection.setblocking(False)
        connection.send(f"{head}{len(body)}\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1 << 16)
    connection.close()
