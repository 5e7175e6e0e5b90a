"""Limits after which the system ends a TCP connection whose other host is out of reach."""

from __future__ import annotations

import socket
import sys


def give_up_after(link: socket.socket, seconds: int) -> None:
    """Have the system end a connection if sent data stay unconfirmed for that many seconds; 0: the system's default."""
    options = {"linux": (getattr(socket, "TCP_USER_TIMEOUT", 18), 1000 * seconds), "darwin": (0x80, seconds)}
    if sys.platform in options:  # on a Mac TCP_RXT_CONNDROPTIME, which Python does not name
        link.setsockopt(socket.IPPROTO_TCP, *options[sys.platform])


def keep_alive(link: socket.socket, seconds: float) -> None:
    """Have the system end a connection if the other host is out of reach for that many seconds.

    A host answers for a process that is stopped.
    """
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    steps = max(1, round(seconds / 4))
    for name, value in ((idle, steps), ("TCP_KEEPINTVL", steps), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    give_up_after(link, 4 * steps)  # no keepalive is sent while data are unconfirmed
