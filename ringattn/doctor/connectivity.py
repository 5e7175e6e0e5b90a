"""A test that every host can open a TCP connection to every other one, before MPI, which would wait for it for ever.

The ranks have no connections to each other yet. They exchange the addresses at which they listen through the doctor,
which all can reach.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import RingError
from ..rendezvous.channel import Channel, take
from ..rendezvous.client import Address, connect, format_endpoint, parse_endpoint
from ..rendezvous.handshake import derive_key, make_key
from ..rendezvous.listener import Listener

ENDPOINT = "RINGATTN_DOCTOR"  # the environment variable that names the `Coordinator` to the ranks
MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class FailedConnection:
    """A connection between two ranks that could not be opened.

    Attributes:
        caller: The rank that tried.
        peer: The rank that it tried to reach.
        why: The system's error message.
    """

    caller: int
    peer: int
    why: str


class Coordinator:
    """The doctor's side of `CoordinatorClient.gather`: sends the lists of all ranks to all, until a rank leaves.

    Args:
        address: An address of this machine at which all ranks reach it.
        size: The number of ranks.

    Attributes:
        endpoint: The argument for `CoordinatorClient`. It holds a secret.
    """

    def __init__(self, address: str, size: int) -> None:
        key = make_key()
        self._listener = Listener([address], lambda rank: key if rank < size else None)
        self._size = size
        self.endpoint = format_endpoint(self._listener.addresses, key)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        ranks: dict[int, Channel] = {}
        while len(ranks) < self._size and (caller := self._listener.accept()):
            ranks[caller[0]] = Channel(caller[1], MESSAGE_BYTES)
        with ExitStack() as stack, suppress(OSError):
            for channel in ranks.values():
                stack.callback(channel.close)  # so that the others see that a rank has left
            while len(ranks) == self._size:
                lists = [take(ranks[rank].receive(), "list", list) for rank in range(self._size)]
                for channel in ranks.values():
                    channel.send(lists)


class CoordinatorClient:
    """A rank's connection to the doctor's `Coordinator`. `RingError` if the doctor cannot be reached.

    Args:
        endpoint: The endpoint of the `Coordinator`.
        rank: This rank.

    Attributes:
        key: The key of this run, which all its ranks know.
        own_address: An address at which others may reach this host as well.
    """

    def __init__(self, endpoint: str, rank: int) -> None:
        addresses, self.key = parse_endpoint(endpoint)
        try:
            link = connect(addresses, self.key, rank)
        except ConnectionError as error:
            raise RingError(f"no TCP connection to the doctor at {error}") from None
        self._channel = Channel(link, MESSAGE_BYTES)
        self.own_address: str = link.getsockname()[0]

    def gather(self, what: list) -> list[Any]:
        """Return the lists of all ranks, of values that JSON can hold. Collective."""
        try:
            self._channel.send({"list": what})
            lists = self._channel.receive()
        except OSError as error:
            raise RingError(f"the connection to the doctor was lost ({error})") from None
        if lists is None:
            raise RingError("a rank left before all ranks had sent their results")
        return list(lists)

    def close(self) -> None:
        self._channel.close()


class AnsweringListener:
    """A listener that answers the ranks of the same run, and closes each connection at once.

    Each rank has a key of its own, so a listener at the same address of another machine is not mistaken for it.
    """

    def __init__(self, key: bytes, rank: int) -> None:
        own = derive_key(key, f"rank {rank}")
        self._listener = Listener([""], lambda rank: own)
        self.port = self._listener.addresses[0][1]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        while caller := self._listener.accept():
            caller[1].close()


def find_failed_connections(endpoint: str, rank: int, hosts: Sequence[str]) -> list[FailedConnection]:
    """Find connections between ranks on different hosts that cannot be opened: the same list on all ranks. Collective.

    Args:
        endpoint: The endpoint of the doctor's `Coordinator`.
        rank: This rank.
        hosts: The address or name of every rank's host.
    """
    with closing(CoordinatorClient(endpoint, rank)) as client, closing(AnsweringListener(client.key, rank)) as own:
        addresses = dict.fromkeys([hosts[rank], client.own_address])
        places = client.gather([(address, own.port) for address in addresses])
        others = [peer for peer, host in enumerate(hosts) if host != hosts[rank]]
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            tried = pool.map(lambda peer: _try(places[peer], client.key, rank, peer), others)
            mine = [(rank, peer, why) for peer, why in zip(others, tried) if why]
        return [FailedConnection(*one) for failed in client.gather(mine) for one in failed]


def _try(addresses: Sequence[Address], key: bytes, rank: int, peer: int) -> str | None:
    """The reason why the rank is at none of the addresses; ``None`` if it is at one."""
    try:
        connect([(address, port) for address, port in addresses], derive_key(key, f"rank {peer}"), rank).close()
    except ConnectionError as error:
        return str(error)
    return None
