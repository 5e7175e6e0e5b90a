"""Whether every host can open a TCP connection to every other, asked before MPI, which would wait for it for ever.

Ranks that cannot talk to each other yet tell each other where they listen through the doctor, whom all can reach.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import RingError

HELLO = 5.0  # s for a connection, and for whoever connects to say who it is
WELCOME = b"welcome\n"


@dataclass(frozen=True)
class Dead:
    """A way on which no connection comes about.

    Attributes:
        caller: The rank that tried.
        peer: The rank that it tried to reach.
        why: In the system's words.
    """

    caller: int
    peer: int
    why: str


class Exchange:
    """The doctor's part: it hands what each rank says to all, round after round, until one has left.

    Args:
        address: Of this machine, at which all ranks reach it.
        size: How many ranks will come.
    """

    def __init__(self, address: str, size: int) -> None:
        self._door = socket.create_server((address, 0), backlog=size)
        self._size, self._token = size, secrets.token_hex(16)
        self.told = f"{address},{self._door.getsockname()[1]},{self._token}"  # for `Voice`
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _run(self) -> None:
        ranks: dict[int, Any] = {}
        with suppress(OSError):
            while len(ranks) < self._size:
                self._admit(ranks)
            while all(lines := [ranks[rank].readline() for rank in range(self._size)]):
                for file in ranks.values():
                    file.write(f"[{','.join(line.strip() for line in lines)}]\n")
                    file.flush()

    def _admit(self, ranks: dict[int, Any]) -> None:
        link = self._door.accept()[0]
        link.settimeout(HELLO)
        file = link.makefile("rw", encoding="utf-8")
        with suppress(OSError, ValueError):
            token, rank = file.readline().split()
            if hmac.compare_digest(token.encode(), self._token.encode()):
                link.settimeout(None)
                ranks[int(rank)] = file


class Voice:
    """A rank's part. `told` is what the doctor's `Exchange` told; `RingError` where the doctor cannot be reached."""

    def __init__(self, told: str, rank: int) -> None:
        address, port, token = told.split(",")
        try:
            self._link = socket.create_connection((address, int(port)), timeout=HELLO)
        except OSError as error:
            raise RingError(f"no TCP connection to the doctor at {address} ({error.strerror or error})") from None
        self._link.settimeout(None)
        self._file = self._link.makefile("rw", encoding="utf-8")
        self._file.write(f"{token} {rank}\n")
        self.own_address: str = self._link.getsockname()[0]  # at which others may reach this host as well

    def gather(self, what: object) -> list[Any]:
        """What all ranks say, anything that JSON can hold. Collective."""
        self._file.write(f"{json.dumps(what)}\n")
        self._file.flush()
        said = self._file.readline()
        if not said:
            raise RingError("a rank left before all had said what they found")
        return list(json.loads(said))

    def close(self) -> None:
        self._file.close()
        self._link.close()


def find_dead(told: str, rank: int, hosts: Sequence[str]) -> list[Dead]:
    """The ways between ranks on different hosts that are dead, the same list on all ranks. Collective.

    Args:
        told: By the doctor's `Exchange`.
        rank: This rank.
        hosts: The address or name of every rank's host.
    """
    with closing(Voice(told, rank)) as voice, closing(_Door()) as door:
        addresses = list(dict.fromkeys([hosts[rank], voice.own_address]))
        cards = [_Card(*card) for card in voice.gather([addresses, door.port, door.secret])]
        others = [peer for peer, host in enumerate(hosts) if host != hosts[rank]]
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            tried = pool.map(lambda peer: _call(cards[peer]), others)
            mine = [(rank, peer, why) for peer, why in zip(others, tried) if why]
        return [Dead(*one) for dead in voice.gather(mine) for one in dead]


class _Card(NamedTuple):
    addresses: list[str]
    port: int
    secret: str


class _Door:
    """Answers those who know its secret. Whoever listens at the same address of another machine does not."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=128)
        self.port, self.secret = self._socket.getsockname()[1], secrets.token_hex(16)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                link = self._socket.accept()[0]
            except OSError:
                return  # closed
            with link, suppress(OSError):
                link.settimeout(HELLO)
                if hmac.compare_digest(link.makefile("rb").readline().strip(), self.secret.encode()):
                    link.sendall(WELCOME)


def _call(card: _Card) -> str | None:
    """Why none of the addresses led to the host; ``None`` if one did."""
    reasons = []
    for address in card.addresses:
        try:
            with socket.create_connection((address, card.port), timeout=HELLO) as link:
                link.sendall(f"{card.secret}\n".encode())
                if link.makefile("rb").readline() == WELCOME:
                    return None
            reasons.append(f"{address} is another machine")
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
    return ", ".join(reasons)
