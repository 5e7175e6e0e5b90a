"""Heartbeats, goodbyes and reports of failures, over a control channel of their own.

Every rank's helper thread sends every other rank a heartbeat at a fixed interval. So a rank that computes for an hour
is known to be alive, and one that stopped is found dead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...errors import RingError
from .cause import Cause, name_rank
from .control_channel import BEAT, BYE, FAIL, LOST, ControlChannel, Sent
from .status_file import ComputingRanks

UNWATCHED = (
    ". It stopped or is out of reach, or a call kept Python's global interpreter lock for that long: then raise timeout"
)
GRACE = 0.2  # s in which messages may still arrive that a rank sent before its goodbye

Place = tuple[str, int]  # where a rank is: (call, hop)


class Member(NamedTuple):
    """A rank as it introduces itself.

    Attributes:
        host: The name of its host.
        timeout: Seconds without a heartbeat after which it takes another rank for dead.
        job_rank: Its rank in the launcher's job, the same in every ring of a split; -1 without such a launcher.
    """

    host: str
    timeout: float
    job_rank: int


class Liveness:
    """Liveness of the other ranks, as this rank sees it, and the heartbeats that it sends.

    Args:
        channel: Carries the messages.
        rank: This rank.
        members: All ranks.
        interval: Seconds between two heartbeats.
        place: Returns the call and hop that this rank is in.
        moving: Returns the messages to and from a rank that are under way here, as lists that JSON can hold.
        on_broken: Called once, with the cause that broke the ring.
    """

    def __init__(
        self,
        channel: ControlChannel,
        rank: int,
        members: Sequence[Member],
        interval: float,
        place: Callable[[], Place],
        moving: Callable[[int], list[list]],
        on_broken: Callable[[Cause], None],
    ):
        self.cause: Cause | None = None
        self.error: RingError | None = None  # made from `cause`
        self.left: set[int] = set()
        self.judges = True  # whether a silent rank breaks the ring; False where another ring of all ranks does that
        self._channel = channel
        self._members = members
        self._timeout = members[rank].timeout
        self._interval = interval
        self._place = place
        self._rank = rank
        self._moving = moving
        self._on_broken = on_broken
        self._peers = [peer for peer in range(len(members)) if peer != rank]
        self._computing = ComputingRanks({peer: members[peer].job_rank for peer in self._peers})
        self._silent = dict.fromkeys(self._peers, 0.0)  # seconds of this process's own waking time
        self._places: dict[int, Place] = dict.fromkeys(self._peers, ("", 0))
        self._agreed = 0  # agreements of all ranks, the same number on all at the same place
        self.moving: dict[int, list[list]] = {}  # each rank's latest report on its messages to and from this one
        self._sending: dict[int, Sent] = {}
        self._outbox: list[Sent] = []  # goodbyes and failures still leaving
        self._said_bye = False
        self._ticked = time.monotonic()
        self._lock = threading.RLock()

    def name(self, rank: int) -> str:
        return name_rank(rank, self._members[rank].host)

    # Calls of the helper thread

    def beat(self) -> None:
        """Handle received messages, send heartbeats, and declare silent ranks dead."""
        with self._lock:
            self.process_messages()
            for peer in [] if self._said_bye else self._peers:
                # A rank that does not receive its heartbeats gets no more of them.
                if peer not in self._sending or self._sending[peer]():
                    agreed = self._agreed  # read before the place, which is never older
                    note = [*self._place(), agreed, self._moving(peer)]
                    self._sending[peer] = self._channel.send(peer, BEAT, json.dumps(note).encode())
            self._check_silence()

    def _check_silence(self) -> None:
        now = time.monotonic()
        # A process that was itself stopped or suspended finds all others silent: only its waking time counts.
        awake = min(now - self._ticked, 2 * self._interval)
        self._ticked = now
        for peer in self._computing.look():
            self._silent[peer] = 0.0
            self.moving.pop(peer, None)  # it moves no message until it can send heartbeats again
        for peer in self._peers:
            self._silent[peer] += awake
            if self.judges and self._silent[peer] > self._timeout and peer not in self.left and self.error is None:
                note = "" if self._members[peer].job_rank >= 0 else UNWATCHED
                self._declare_dead("silent", peer, f"{self._timeout:g} s", note)

    def _declare_dead(self, kind: str, peer: int, detail: str = "", note: str = "") -> None:
        self.fail(Cause(kind, peer, self._members[peer].host, *self._places[peer], detail, note))

    # Calls of both threads

    def process_messages(self) -> None:
        """Handle all received messages."""
        if not self._lock.acquire(blocking=False):
            return  # the other thread handles them
        try:
            while (message := self._channel.take()) is not None:
                self._handle(*message)
        finally:
            self._lock.release()

    def _handle(self, sender: int, kind: int, note: bytes) -> None:
        if kind == LOST:
            if sender not in self.left:
                self._declare_dead("disconnected", sender)
            self.left.add(sender)  # no goodbye can come from it
            return
        self._silent[sender] = 0.0
        if kind == BEAT:
            places = self._places  # read before the number: a newer one is not overwritten
            what, hop, agreed, self.moving[sender] = json.loads(note)
            if agreed >= self._agreed:
                places[sender] = (what, hop)
        elif kind == BYE:
            self.left.add(sender)
        elif self.error is None:
            self._break(self._reviewed(Cause.decode(note), sender))

    def _reviewed(self, cause: Cause, sender: int) -> Cause:
        """The cause that `sender` reports; a note says where this rank hears from a rank that is reported silent."""
        rank = cause.rank
        if cause.kind != "silent" or rank is None:
            return cause
        if rank != self._rank and self._silent[rank] >= 4 * self._interval:
            return cause
        seen = "is alive" if rank == self._rank else f"is heard by {self.name(self._rank)}"
        why = f" ({self.name(sender)} says so, but it {seen}: look at the way between the two)"
        return replace(cause, note=cause.note + why)

    def _break(self, cause: Cause, error: RingError | None = None) -> None:
        self.cause = cause
        self.error = error or cause.error
        self._on_broken(cause)

    def fail(self, cause: Cause, error: RingError | None = None) -> None:
        """Break the ring because of `cause`, raise `error` on this rank, and report to all. Only the first counts."""
        with self._lock:
            if self.error is None:
                self._break(cause, error)
                self._send_all(cause.encode(), FAIL)

    def set_all_places(self, place: Place) -> None:
        """Record an agreement of all ranks, which are at `place`."""
        self.count_agreement()
        self._places = dict.fromkeys(self._peers, place)

    def count_agreement(self) -> None:
        """Record an agreement of all ranks. Heartbeats from before may be read later; their places are old then."""
        self._agreed += 1

    def seen(self, peer: int) -> None:
        """Record that data of `peer` has arrived: it is alive, even if its heartbeats wait behind its data."""
        self._silent[peer] = 0.0

    def say_bye(self, patience: float) -> None:
        """Send all a goodbye, and wait for at most `patience` seconds until the messages have left."""
        with self._lock:
            self._said_bye = True  # the last message, so that the others know when nothing more will come
            self._send_all(b"null", BYE)
        until = time.monotonic() + patience
        while not all(sent() for sent in self._outbox) and time.monotonic() < until:
            time.sleep(1e-3)

    def _send_all(self, note: bytes, kind: int) -> None:
        self._outbox += [self._channel.send(peer, kind, note) for peer in self._peers]

    def everybody_left(self) -> bool:
        """Whether every rank has said goodbye or, in a broken ring, has been silent for its timeout."""
        broken = self.error is not None
        return all(peer in self.left or (broken and self._silent[peer] > self._timeout) for peer in self._peers)
