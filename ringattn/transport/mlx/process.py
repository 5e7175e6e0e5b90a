"""What all rings over `mx.distributed` of a process share: the fabric, the sockets, and the thread that serves them."""

from __future__ import annotations

import json
import platform
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np

from ...errors import RingError
from ..failures.control_channel import LOST, Sent
from .backend import Group
from .bootstrap import Card, Meeting
from .scheduler import OFFER, REACHED, Fabric
from .sockets import Switchboard


class RingMember(Protocol):
    """What a process asks of each of its rings."""

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""

    def beat(self) -> None:
        """Send heartbeats and judge those of the others."""

    def process_messages(self) -> None:
        """Handle all received messages."""

    def fail(self, error: BaseException) -> None:
        """Break the ring because of `error`."""


_CARD_BYTES = 4096
_OPENING = 0  # the channel of the fabric, and of rounds that belong to no ring yet

_hub: Hub | None = None


def hub() -> Hub:
    """The hub of this process; the first call connects all processes, and is collective."""
    global _hub
    if _hub is None:
        _hub = Hub()
    return _hub


def is_open() -> bool:
    """Whether this process is connected by `mx.distributed`."""
    return _hub is not None


class Hub:
    """See above. Its thread lives as long as the process, as MLX's group does."""

    def __init__(self) -> None:
        group = Group()
        self.rank, self.size = group.rank, group.size
        self._cards, sockets = _meet(group)
        self.hosts = tuple(card["host"] for card in self._cards)
        self.gone: set[int] = set()  # ranks whose connection has ended
        self._inboxes: dict[int, deque[tuple[int, int, bytes]]] = defaultdict(deque)
        self._rings: dict[int, RingMember] = {}
        self._opened = _OPENING
        self._error: BaseException | None = None
        self._board = Switchboard(sockets, self._deliver, self._lost)
        self.fabric = Fabric(group, lambda peer, kind, note: self._board.send(peer, _OPENING, kind, note), self._failed)
        threading.Thread(target=self._run, name="ringattn", daemon=True).start()

    # For the rings

    def introduce(self, about: object) -> list:
        """What every rank says about a ring that is opened, anything that JSON can hold."""
        payload = [memoryview(json.dumps(about).encode())]

        def look() -> None:
            if self._error is not None:
                raise RingError(f"a ring of this process broke ({self._error}), and with it mx.distributed")
            if self.gone:
                names = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in sorted(self.gone))
                raise RingError(f"{names} left before the ring was open", rank=min(self.gone))

        look()
        replies = self.fabric.exchange(_OPENING, payload, lambda poll: self.fabric.wait(poll, look))
        return [json.loads(bytes(reply)) for reply in replies]

    def new_channel(self) -> int:
        """The channel of a new ring: the same on all ranks, because opening one is collective."""
        self._opened += 1
        return self._opened

    def join(self, channel: int, ring: RingMember) -> None:
        """Let `ring` hear what comes for it, and beat."""
        self._rings[channel] = ring
        self._board.ring_bell()

    def part(self, channel: int) -> None:
        """The ring is retired."""
        self._rings.pop(channel, None)

    def post(self, channel: int) -> TcpPost:
        """The post of a ring."""
        return TcpPost(self._board, channel, self._inboxes[channel])

    def say_how_far(self) -> None:
        """Tell all others which gathers this rank will need nobody for."""
        for peer in range(self.size):
            if peer != self.rank:
                self._board.send(peer, _OPENING, REACHED, self.fabric.epoch.to_bytes(8, "little"))

    # The thread

    def _run(self) -> None:
        due: dict[int, float] = {}
        while True:
            now = time.monotonic()
            for channel, ring in list(self._rings.items()):
                if now >= due.get(channel, now):
                    self._guarded(ring.beat)
                    due[channel] = now + ring.interval
            until = min((due[channel] for channel in list(self._rings) if channel in due), default=now + 1)
            self._guarded(partial(self._board.pump, max(0.0, until - time.monotonic())))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it must reach the main thread and the peers
            self.fabric.fail(error)

    def _deliver(self, sender: int, channel: int, kind: int, note: bytes) -> None:
        if kind >= OFFER:
            self.fabric.hear(sender, kind, note)
        else:
            self._inboxes[channel].append((sender, kind, note))
            self._wake(channel)

    def _lost(self, peer: int) -> None:
        self.gone.add(peer)
        for channel in list(self._rings):
            self._inboxes[channel].append((peer, LOST, b""))
            self._wake(channel)

    def _wake(self, channel: int) -> None:
        if channel in self._rings:
            self._rings[channel].process_messages()
        with self.fabric.lock:
            self.fabric.changed.notify_all()

    def _failed(self, error: BaseException) -> None:
        """Break all rings because the fabric cannot go on."""
        self._error = error
        for ring in list(self._rings.values()):
            ring.fail(error)


class TcpPost:
    """A `ControlChannel` on one channel of a switchboard."""

    def __init__(self, board: Switchboard, channel: int, inbox: deque[tuple[int, int, bytes]]):
        self._board, self._channel, self._inbox = board, channel, inbox

    def send(self, peer: int, kind: int, note: bytes) -> Sent:
        return self._board.send(peer, self._channel, kind, note)

    def take(self) -> tuple[int, int, bytes] | None:
        return self._inbox.popleft() if self._inbox else None


def _meet(group: Group) -> tuple[list[Card], dict[int, socket.socket]]:
    """Every rank's card, and the sockets to all others."""
    meeting = Meeting(platform.node(), group.addresses)
    text = json.dumps(meeting.card).encode()
    card = np.zeros(_CARD_BYTES, np.uint8)
    card[: len(text)] = np.frombuffer(text, np.uint8)
    rows = group.gather(card, mx.default_stream(mx.cpu))
    cards: list[Card] = [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
    return cards, meeting.meet(group.rank, cards)
