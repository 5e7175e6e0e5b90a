"""State that all rings over `mx.distributed` of a process share: the scheduler, the sockets and their thread."""

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
from .bootstrap import Endpoint, TcpBootstrap
from .scheduler import OFFER, MessageScheduler
from .sockets import ControlSockets


class RingMember(Protocol):
    """A ring, as far as its process knows it."""

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""

    def beat(self) -> None:
        """Send heartbeats and judge those of the others."""

    def process_messages(self) -> None:
        """Handle all received messages."""

    def fail(self, error: BaseException) -> None:
        """Break the ring because of `error`."""


_ENDPOINT_BYTES = 4096  # of the gather in which every rank gives its endpoint
_PROCESS_CHANNEL = 0  # the channel of the scheduler, and of gathers before a ring is open

_process_links: ProcessLinks | None = None


def process_links() -> ProcessLinks:
    """Return the links of this process. The first call connects all processes and is collective."""
    global _process_links
    if _process_links is None:
        _process_links = ProcessLinks()
    return _process_links


def is_open() -> bool:
    """Whether this process is connected by `mx.distributed`."""
    return _process_links is not None


class ProcessLinks:
    """The connections of this process to all others, over `mx.distributed` and over TCP.

    A thread serves the sockets and the heartbeats of all rings. It lives as long as the process, as MLX's group does.

    Attributes:
        hosts: The host name of every rank.
        lost_peers: The ranks whose TCP connection has ended.
        scheduler: The scheduler of everything that moves over `mx.distributed`.
    """

    def __init__(self) -> None:
        group = Group()
        self.rank = group.rank
        self.size = group.size
        self.hosts, sockets = _connect(group)
        self.lost_peers: set[int] = set()
        self._inboxes: dict[int, deque[tuple[int, int, bytes]]] = defaultdict(deque)
        self._rings: dict[int, RingMember] = {}
        self._last_channel = _PROCESS_CHANNEL
        self._error: BaseException | None = None
        self._sockets = ControlSockets(sockets, self._deliver, self._lost)
        self.scheduler = MessageScheduler(group, self._send_note, self._break_rings)
        threading.Thread(target=self._run, name="ringattn", daemon=True).start()

    # For the rings

    def exchange_json(self, value: object) -> list:
        """Gather every rank's `value`, which JSON must be able to hold. No ring need be open."""
        payload = [memoryview(json.dumps(value).encode())]
        self._check()
        replies = self.scheduler.exchange(
            _PROCESS_CHANNEL, payload, lambda condition: self.scheduler.wait(condition, self._check)
        )
        return [json.loads(bytes(reply)) for reply in replies]

    def _check(self) -> None:
        if self._error is not None:
            raise RingError(
                f"a ring of this process broke ({self._error}), so mx.distributed can carry no other; restart the job"
            )
        if self.lost_peers:
            names = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in sorted(self.lost_peers))
            raise RingError(f"{names} left before the ring was open", rank=min(self.lost_peers))

    def new_channel(self) -> int:
        """Return the channel of a new ring: the same on all ranks, because to open a ring is collective."""
        self._last_channel += 1
        return self._last_channel

    def add_ring(self, channel: int, ring: RingMember) -> None:
        """Start the heartbeats of `ring` and the delivery of its messages."""
        self._rings[channel] = ring
        self._sockets.wake()

    def remove_ring(self, channel: int) -> None:
        """Stop the heartbeats of a ring that is closed on all ranks."""
        self._rings.pop(channel, None)

    def control_channel(self, channel: int) -> TcpControlChannel:
        """Return the control channel of a ring."""
        return TcpControlChannel(self._sockets, channel, self._inboxes[channel])

    def _send_note(self, peer: int, kind: int, note: bytes) -> None:
        self._sockets.send(peer, _PROCESS_CHANNEL, kind, note)

    # The thread

    def _run(self) -> None:
        next_beat: dict[int, float] = {}
        while True:
            now = time.monotonic()
            for channel, ring in list(self._rings.items()):
                if now >= next_beat.get(channel, now):
                    self._guarded(ring.beat)
                    next_beat[channel] = now + ring.interval
            until = min((next_beat[channel] for channel in list(self._rings) if channel in next_beat), default=now + 1)
            self._guarded(partial(self._sockets.process_events, max(0.0, until - time.monotonic())))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the main thread and the peers must get it
            self.scheduler.fail(error)

    def _deliver(self, sender: int, channel: int, kind: int, note: bytes) -> None:
        if kind >= OFFER:
            self.scheduler.receive_note(sender, kind, note)
        else:
            self._inboxes[channel].append((sender, kind, note))
            self._notify(channel)

    def _lost(self, peer: int) -> None:
        self.lost_peers.add(peer)
        for channel in list(self._rings):
            self._inboxes[channel].append((peer, LOST, b""))
            self._notify(channel)

    def _notify(self, channel: int) -> None:
        """Let a ring handle its new messages, and wake the threads that wait."""
        if channel in self._rings:
            self._rings[channel].process_messages()
        with self.scheduler.lock:
            self.scheduler.changed.notify_all()

    def _break_rings(self, error: BaseException) -> None:
        """Break all rings, because the scheduler failed."""
        self._error = error
        for ring in list(self._rings.values()):
            ring.fail(error)


class TcpControlChannel:
    """A `ControlChannel` on one channel of the sockets."""

    def __init__(self, sockets: ControlSockets, channel: int, inbox: deque[tuple[int, int, bytes]]):
        self._sockets = sockets
        self._channel = channel
        self._inbox = inbox

    def send(self, peer: int, kind: int, note: bytes) -> Sent:
        return self._sockets.send(peer, self._channel, kind, note)

    def take(self) -> tuple[int, int, bytes] | None:
        return self._inbox.popleft() if self._inbox else None


def _connect(group: Group) -> tuple[tuple[str, ...], dict[int, socket.socket]]:
    """Return every rank's host name, and a socket to every other rank."""
    bootstrap = TcpBootstrap(platform.node(), group.addresses)
    text = json.dumps(bootstrap.endpoint).encode()
    own = np.zeros(_ENDPOINT_BYTES, np.uint8)
    own[: len(text)] = np.frombuffer(text, np.uint8)
    rows = group.gather(own, mx.default_stream(mx.cpu))
    endpoints: list[Endpoint] = [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
    return tuple(endpoint["host"] for endpoint in endpoints), bootstrap.connect_all(group.rank, endpoints)
