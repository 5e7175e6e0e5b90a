"""The way of the launcher's standard input to rank 0.

mpiexec could forward it, but MPICH's ends the job when more than 64 KB wait for a rank that does not read yet, and
under Open MPI 5.0 rank 0 never sees the end. So rank 0's wrapper opens a second connection. TCP blocks the launcher
while the program does not read, so the launcher holds only the part that it sends.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress

from ..rendezvous.keepalive import give_up_after

_PART = 1 << 16  # bytes
_BACKGROUND = 0.5  # s between attempts to read a terminal that another job reads at present


class StandardInput:
    """A thread that sends this process's standard input, and its end, through a socket, until `close`.

    Args:
        link: Connected to the wrapper of rank 0, which passes the input on.
        descriptor: The descriptor to read; ``None``: there is no input.
    """

    def __init__(self, link: socket.socket, descriptor: int | None) -> None:
        link.setblocking(True)
        give_up_after(link, 0)  # a program may read nothing for an hour
        self._link = link
        self._descriptor = descriptor
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading; the rest of the input stays unread."""
        os.close(self._stop)
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._link.close()
        if not self._thread.is_alive():
            os.close(self._wake)

    def _send(self) -> None:
        # Reading a terminal from the background then fails instead of stopping the launcher.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN])
        with suppress(OSError):  # the program has ended, or has closed its input
            while part := self._read():
                self._link.sendall(part)
            if part is not None:
                self._link.shutdown(socket.SHUT_WR)

    def _read(self) -> bytes | None:
        """Return the next part, empty at the end of the input, or ``None`` when the reader is gone."""
        if self._descriptor is None:
            return b""
        ends: list[int | socket.socket] = [self._wake, self._link]  # the wrapper sends nothing: readable means closed
        while select.select([self._descriptor, *ends], [], [])[0] == [self._descriptor]:
            try:
                return os.read(self._descriptor, _PART)
            except BlockingIOError:
                continue  # another process read it first
            except OSError:
                if not _in_background(self._descriptor):
                    return b""  # the terminal is gone, or the descriptor cannot be read
                if select.select(ends, [], [], _BACKGROUND)[0]:
                    break
        return None


def own_descriptor() -> int | None:
    """The descriptor of this process's standard input, or ``None`` if it has none."""
    return None if sys.__stdin__ is None else 0


def _in_background(descriptor: int) -> bool:
    """Whether `descriptor` is a terminal that belongs to another job at present."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:
        return False
