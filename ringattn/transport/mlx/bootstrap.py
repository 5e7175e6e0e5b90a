"""The set-up of a TCP connection between every two ranks of a job.

Every rank listens on a port of its own. Over another way that exists already it gives all others its endpoint: its
addresses, the port and a public key. Then each rank connects to those of lower rank; see `rendezvous` for the proof of
identity on both sides. If an address leads to another machine (as 127.0.0.1 can), the next one is tried.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TypedDict

from ...errors import RingError
from ...rendezvous.client import connect
from ...rendezvous.key_exchange import KeyExchange
from ...rendezvous.listener import Listener

CONNECT_TIMEOUT = 60.0  # s until all ranks must be connected


class Endpoint(TypedDict):
    """The data with which others connect to a rank. No part of it is secret."""

    host: str
    addresses: list[str]
    port: int
    public: str  # key of its `KeyExchange`


class TcpBootstrap:
    """One rank's side of the set-up: construct it, give `endpoint` to all other ranks, then `connect_all`.

    Args:
        host: The name of this rank's host.
        addresses: Addresses at which the other ranks may reach this one, the best first.
    """

    def __init__(self, host: str, addresses: Sequence[str]):
        local = all(address.startswith("127.") for address in addresses)
        self._keys: dict[int, bytes] = {}  # of the ranks that connect to this one
        # Where all ranks are on this machine, no other machine can connect.
        self._listener = Listener(["127.0.0.1" if local else ""], self._keys.get)
        self._exchange = KeyExchange()
        port = self._listener.addresses[0][1]
        self.endpoint = Endpoint(host=host, addresses=list(addresses), port=port, public=self._exchange.public)

    def connect_all(self, rank: int, endpoints: Sequence[Endpoint]) -> dict[int, socket.socket]:
        """Return a connected socket for every other rank.

        Args:
            rank: This rank.
            endpoints: The endpoints of all ranks.

        Raises:
            RingError: If two ranks cannot reach each other; the message names them.
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT
        others = {peer: endpoint for peer, endpoint in enumerate(endpoints) if peer != rank}
        keys = {peer: self._exchange.key_with(endpoint["public"]) for peer, endpoint in others.items()}
        higher = range(rank + 1, len(endpoints))
        self._keys.update({peer: keys[peer] for peer in higher})
        with closing(self._listener):
            connected = {peer: _connect(rank, peer, endpoints[peer], keys[peer]) for peer in range(rank)}
            accepted = self._accept(len(higher), deadline)
        if missing := [peer for peer in higher if peer not in accepted]:
            names = " and ".join(f"rank {peer} ({endpoints[peer]['host']})" for peer in missing)
            own = f"rank {rank} ({endpoints[rank]['host']})"
            raise RingError(f"{names} did not connect to {own} within {CONNECT_TIMEOUT:g} s")
        return {**connected, **accepted}

    def _accept(self, count: int, deadline: float) -> dict[int, socket.socket]:
        accepted: dict[int, socket.socket] = {}
        while len(accepted) < count and (caller := self._listener.accept(max(0.0, deadline - time.monotonic()))):
            peer, link = caller
            if peer in accepted:
                accepted[peer].close()  # the peer gave up this connection before it knew of the acceptance
            accepted[peer] = link
        return accepted


def _connect(rank: int, peer: int, endpoint: Endpoint, key: bytes) -> socket.socket:
    try:
        return connect([(address, endpoint["port"]) for address in endpoint["addresses"]], key, rank)
    except ConnectionError as error:
        raise RingError(
            f"rank {rank} cannot reach rank {peer} ({endpoint['host']}) at {', '.join(endpoint['addresses'])} "
            f"({error}); every rank must be able to open a TCP connection to every other one, besides the links that "
            "blocks travel on"
        ) from None
