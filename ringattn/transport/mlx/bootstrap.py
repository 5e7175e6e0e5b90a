"""How the ranks of a job get a TCP connection between every two of them.

Every rank listens on a port of its own and tells all others, over a way they have already, at which addresses it may
be reached and a secret to say there. Then each calls those of lower rank. A caller that does not know the secret is not
let in, and an address that leads elsewhere (127.0.0.1 of another machine) is given up for the next.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import TypedDict

from ...errors import RingError

PATIENCE = 60.0  # s for all to be connected
_TRY = 5.0  # s for one address to answer
_HELLO = struct.Struct("<16sI")  # secret, rank of the caller
_WELCOME = b"\x01"


class Card(TypedDict):
    """What a rank tells the others about itself."""

    host: str
    addresses: list[str]
    port: int
    secret: str  # in hexadecimal digits


class Meeting:
    """One rank's part of it: make it, pass `card` to all, then `meet`."""

    def __init__(self, host: str, addresses: Sequence[str]):
        local = all(address.startswith("127.") for address in addresses)
        # Only those who can come should be able to knock.
        self._door = socket.create_server(("127.0.0.1" if local else "", 0), backlog=128)
        self._secret = secrets.token_bytes(16)
        port = self._door.getsockname()[1]
        self.card = Card(host=host, addresses=list(addresses), port=port, secret=self._secret.hex())

    def meet(self, rank: int, cards: Sequence[Card]) -> dict[int, socket.socket]:
        """A connected socket for every other rank.

        Raises:
            RingError: Two ranks cannot reach each other; the message says which.
        """
        deadline = time.monotonic() + PATIENCE
        found: dict[int, socket.socket] = {}
        higher = set(range(rank + 1, len(cards)))
        host = threading.Thread(target=self._receive, args=(higher, found, deadline), daemon=True)
        host.start()
        try:
            called = {peer: _call(rank, peer, cards[peer]) for peer in range(rank)}
            host.join()
        finally:
            self._door.close()
        if missing := sorted(higher - found.keys()):
            names = " and ".join(f"rank {peer} ({cards[peer]['host']})" for peer in missing)
            raise RingError(f"{names} did not connect to rank {rank} ({cards[rank]['host']}) within {PATIENCE:g} s")
        return {**called, **found}

    def _receive(self, expected: set[int], found: dict[int, socket.socket], deadline: float) -> None:
        while expected - found.keys() and time.monotonic() < deadline:
            self._door.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, _ = self._door.accept()
            except OSError:
                continue
            peer = self._admit(sock)
            if peer in expected and peer not in found:
                found[peer] = sock
            else:
                sock.close()

    def _admit(self, sock: socket.socket) -> int:
        """The rank that calls; -1 if it is none."""
        try:
            sock.settimeout(_TRY)
            said, rank = _HELLO.unpack(_read(sock, _HELLO.size))
            if not hmac.compare_digest(said, self._secret):
                return -1
            sock.sendall(_WELCOME)
        except OSError:
            return -1
        return int(rank)


def _call(rank: int, peer: int, card: Card) -> socket.socket:
    why = "it has no address"
    for address in card["addresses"]:
        try:
            sock = socket.create_connection((address, card["port"]), timeout=_TRY)
        except OSError as error:
            why = f"{address}: {error}"
            continue
        try:
            sock.sendall(_HELLO.pack(bytes.fromhex(card["secret"]), rank))
            if _read(sock, 1) == _WELCOME:
                return sock
            why = f"{address} is another machine"
        except OSError as error:
            why = f"{address}: {error}"
        sock.close()
    raise RingError(
        f"rank {rank} cannot reach rank {peer} ({card['host']}) at {', '.join(card['addresses'])} ({why}); every rank "
        "must be able to open a TCP connection to every other one, besides the links that blocks travel on"
    )


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("hung up")
        data += more
    return data


def own_address_towards(address: str) -> str | None:
    """The address that this machine uses to reach `address`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 9))
        except OSError:
            return None
        name: str = sock.getsockname()[0]
        return name
