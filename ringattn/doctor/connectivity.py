"""Whether every host can open a TCP connection to every other, asked before MPI, which would wait for it for ever.

Ranks that cannot talk to each other yet tell each other where they listen through the doctor, whom all can reach.
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
    """Failed TCP connection between two ranks.

    Attributes:
        caller: The rank that tried.
        peer: The rank that it tried to reach.
        why: In the system's words.
    """

    caller: int
    peer: int
    why: str


class Coordinator:
    """The doctor's part: it hands what each rank says to all, round after round, until one has left.

    Args:
        address: Of this machine, at which all ranks reach it.
        size: How many ranks will come.

    Attributes:
        endpoint: For `CoordinatorClient`. It holds a secret.
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
                stack.callback(channel.close)  # which tells the others that a rank has left
            while len(ranks) == self._size:
                said = [take(ranks[rank].receive(), "said", list) for rank in range(self._size)]
                for channel in ranks.values():
                    channel.send(said)


class CoordinatorClient:
    """A rank's part. `RingError` where the doctor cannot be reached.

    Args:
        endpoint: Of the doctor's `Coordinator`.
        rank: This rank.

    Attributes:
        key: That all ranks of this run know.
        own_address: At which others may reach this host as well.
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
        """What all ranks say, lists of anything that JSON can hold. Collective."""
        try:
            self._channel.send({"said": what})
            said = self._channel.receive()
        except OSError as error:
            raise RingError(f"the connection to the doctor was lost ({error})") from None
        if said is None:
            raise RingError("a rank left before all had said what they found")
        return list(said)

    def close(self) -> None:
        self._channel.close()


class AnsweringListener:
    """Answers the ranks of the same run, and keeps no connection.

    Whoever listens at the same address of another machine has another key: each rank has its own.
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
    """The ways between ranks on different hosts that are dead, the same list on all ranks. Collective.

    Args:
        endpoint: Of the doctor's `Coordinator`.
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
        return [FailedConnection(*one) for dead in client.gather(mine) for one in dead]


def _try(addresses: Sequence[Address], key: bytes, rank: int, peer: int) -> str | None:
    """Why none of the addresses led to the rank; ``None`` if one did."""
    try:
        connect([(address, port) for address, port in addresses], derive_key(key, f"rank {peer}"), rank).close()
    except ConnectionError as error:
        return str(error)
    return None
