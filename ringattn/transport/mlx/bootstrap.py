"""How the ranks of a job get a TCP connection between every two of them.

Every rank listens on a port of its own and tells all others, over a way they have already, at which addresses it may
be reached and its public key. Then each calls those of lower rank; see `rendezvous` for how the two prove who they are.
An address that leads elsewhere (127.0.0.1 of another machine) is given up for the next.
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

PATIENCE = 60.0  # s for all to be connected


class Card(TypedDict):
    """What a rank tells the others about itself. Nothing in it is secret."""

    host: str
    addresses: list[str]
    port: int
    public: str  # of its `KeyExchange`


class Meeting:
    """One rank's part of it: make it, pass `card` to all, then `meet`."""

    def __init__(self, host: str, addresses: Sequence[str]):
        local = all(address.startswith("127.") for address in addresses)
        self._keys: dict[int, bytes] = {}  # of the ranks that call
        # Only those who can come should be able to knock.
        self._listener = Listener(["127.0.0.1" if local else ""], self._keys.get)
        self._exchange = KeyExchange()
        port = self._listener.addresses[0][1]
        self.card = Card(host=host, addresses=list(addresses), port=port, public=self._exchange.public)

    def meet(self, rank: int, cards: Sequence[Card]) -> dict[int, socket.socket]:
        """A connected socket for every other rank.

        Raises:
            RingError: Two ranks cannot reach each other; the message says which.
        """
        deadline = time.monotonic() + PATIENCE
        keys = {peer: self._exchange.key_with(card["public"]) for peer, card in enumerate(cards) if peer != rank}
        callers = range(rank + 1, len(cards))
        self._keys.update({peer: keys[peer] for peer in callers})
        with closing(self._listener):
            called = {peer: _call(rank, peer, cards[peer], keys[peer]) for peer in range(rank)}
            found = self._receive(len(callers), deadline)
        if missing := [peer for peer in callers if peer not in found]:
            names = " and ".join(f"rank {peer} ({cards[peer]['host']})" for peer in missing)
            raise RingError(f"{names} did not connect to rank {rank} ({cards[rank]['host']}) within {PATIENCE:g} s")
        return {**called, **found}

    def _receive(self, count: int, deadline: float) -> dict[int, socket.socket]:
        found: dict[int, socket.socket] = {}
        while len(found) < count and (caller := self._listener.accept(max(0.0, deadline - time.monotonic()))):
            peer, link = caller
            if peer in found:
                found[peer].close()  # it gave up that one before it knew that it was accepted
            found[peer] = link
        return found


def _call(rank: int, peer: int, card: Card, key: bytes) -> socket.socket:
    try:
        return connect([(address, card["port"]) for address in card["addresses"]], key, rank)
    except ConnectionError as error:
        raise RingError(
            f"rank {rank} cannot reach rank {peer} ({card['host']}) at {', '.join(card['addresses'])} ({error}); every "
            "rank must be able to open a TCP connection to every other one, besides the links that blocks travel on"
        ) from None
