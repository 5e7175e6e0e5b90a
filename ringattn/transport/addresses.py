"""Addresses of this machine."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..errors import ArgumentError

ADDRESSES = "RINGATTN_ADDRESSES"  # of all hosts of the job, with commas between them; the launcher sets it
INTERFACE = "RINGATTN_INTERFACE"  # the network interface for messages between hosts; the launcher sets it
RDMA = "RINGATTN_RDMA"  # the RDMA devices of all hosts, as in MLX's host files; the launcher sets it
_SIOCGIFADDR = 0x8915 if sys.platform == "linux" else 0xC0206921


def address_for_peers(hosts: Sequence[str]) -> str:
    """The address at which ranks on `hosts`, the host names of all ranks, reach this machine.

    It is that of the launcher's interface, else the one that the launcher uses, else that of the default route. It is
    127.0.0.1 where all ranks are on this machine.
    """
    if name := os.environ.get(INTERFACE):
        return interface_address(name)
    for host in filter(None, os.environ.get(ADDRESSES, "").split(",")):
        if is_here(host):
            return socket.gethostbyname(host)
    if len(set(hosts)) == 1:
        return "127.0.0.1"
    return own_address_towards("192.0.2.1") or "127.0.0.1"  # TEST-NET-1, which no host has


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface of this machine; `ArgumentError` where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            host = os.uname().nodename
            raise ArgumentError(f"--interface: {name} has no IPv4 address on {host} ({error.strerror})") from None
    return socket.inet_ntoa(answer[20:24])


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
