"""Addresses of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress


def own_address_towards(address: str) -> str | None:
    """The address that this machine uses to reach `address`, ``None`` where it has no route. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 9))
        except OSError:
            return None
        name: str = sock.getsockname()[0]
        return name


def own_addresses(hosts: Sequence[str]) -> list[str]:
    """The addresses that this machine uses to reach `hosts`; that of the loopback where it reaches none."""
    return list(dict.fromkeys(filter(None, map(own_address_towards, hosts)))) or ["127.0.0.1"]


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 0)[0]
        with socket.socket(family) as probe:
            probe.bind(address)  # works with one's own addresses alone
            return True
    return host in ("localhost", os.uname().nodename)
