"""Who is alive: heartbeats, goodbyes and news of failures, by a post of their own.

Every rank's helper thread sends every other rank a small message now and then, so that a rank that computes for an hour
is known to be alive and one that stopped is not.
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
from .control_channel import BEAT, BYE, FAIL, LOST, Post, Sent
from .status_file import Computing

UNWATCHED = (
    ". It stopped or is out of reach, or a call kept Python's global interpreter lock for that long: then raise timeout"
)
GRACE = 0.2  # s in which messages may still arrive that a rank sent before its goodbye

Place = tuple[str, int]  # what a rank is doing: (call, hop)


class Member(NamedTuple):
    """A rank as it introduces itself.

    Attributes:
        host: The name of its host.
        timeout: Seconds without a sign of life after which it takes another rank for dead.
        job_rank: Its rank in the launcher's job, which a part of a ring does not change; -1 without such a launcher.
    """

    host: str
    timeout: float
    job_rank: int


class Liveness:
    """What this rank knows about the others, and what it tells them.

    Args:
        post: Where messages go and come from.
        rank: This rank.
        members: All ranks.
        interval: Seconds between two heartbeats.
        place: Says what this rank is doing.
        moving: Says which messages to or from a rank are under way here, in lists that JSON can hold.
        on_broken: Called with what broke the ring, once.
    """

    def __init__(
        self,
        post: Post,
        rank: int,
        members: Sequence[Member],
        interval: float,
        place: Callable[[], Place],
        moving: Callable[[int], list[list]],
        on_broken: Callable[[Cause], None],
    ):
        self.cause: Cause | None = None
        self.error: RingError | None = None  # which says it
        self.left: set[int] = set()
        self._post = post
        self._members = members
        self._timeout = members[rank].timeout
        self._interval = interval
        self._place = place
        self._me = rank
        self._moving = moving
        self._on_broken = on_broken
        self._peers = [peer for peer in range(len(members)) if peer != rank]
        self._computing = Computing({peer: members[peer].job_rank for peer in self._peers})
        self._silent = dict.fromkeys(self._peers, 0.0)  # seconds of this process's own waking time
        self._places: dict[int, Place] = dict.fromkeys(self._peers, ("", 0))
        self.moving: dict[int, list[list]] = {}  # what each rank has said last of its messages to and from this one
        self._sending: dict[int, Sent] = {}
        self._outbox: list[Sent] = []  # goodbyes and failures still leaving
        self._said_bye = False
        self._ticked = time.monotonic()
        self._lock = threading.RLock()

    def name(self, rank: int) -> str:
        return name_rank(rank, self._members[rank].host)

    # What the helper thread does

    def beat(self) -> None:
        """Hear the others, tell them that this rank lives, and judge who does not."""
        with self._lock:
            self.hear()
            for peer in [] if self._said_bye else self._peers:
                # One that does not drain its messages gets no more of them.
                if peer not in self._sending or self._sending[peer]():
                    note = [*self._place(), self._moving(peer)]
                    self._sending[peer] = self._post.send(peer, BEAT, json.dumps(note).encode())
            self._judge()

    def _judge(self) -> None:
        now = time.monotonic()
        # A process that was itself stopped or suspended finds everybody silent: only its waking time counts.
        awake = min(now - self._ticked, 2 * self._interval)
        self._ticked = now
        for peer in self._computing.look():
            self._silent[peer] = 0.0
            self.moving.pop(peer, None)  # nothing moves there until it can send heartbeats again
        for peer in self._peers:
            self._silent[peer] += awake
            if self._silent[peer] > self._timeout and peer not in self.left and self.error is None:
                note = "" if self._members[peer].job_rank >= 0 else UNWATCHED
                self._declare_dead("silent", peer, f"{self._timeout:g} s", note)

    def _declare_dead(self, kind: str, peer: int, detail: str = "", note: str = "") -> None:
        self.fail(Cause(kind, peer, self._members[peer].host, *self._places[peer], detail, note))

    # What both threads do

    def hear(self) -> None:
        """Take in what the others have said."""
        if not self._lock.acquire(blocking=False):
            return  # the other thread is at it
        try:
            while (message := self._post.take()) is not None:
                self._take(*message)
        finally:
            self._lock.release()

    def _take(self, sender: int, kind: int, note: bytes) -> None:
        if kind == LOST:
            if sender not in self.left:
                self._declare_dead("disconnected", sender)
            self.left.add(sender)  # it will say no goodbye any more
            return
        self._silent[sender] = 0.0
        if kind == BEAT:
            what, hop, self.moving[sender] = json.loads(note)
            self._places[sender] = (what, hop)
        elif kind == BYE:
            self.left.add(sender)
        elif self.error is None:
            self._break(self._reviewed(Cause.decode(note), sender))

    def _reviewed(self, cause: Cause, sender: int) -> Cause:
        """What `sender` says, with what this rank knows better of one that is accused of silence."""
        rank = cause.rank
        if cause.kind != "silent" or rank is None:
            return cause
        if rank != self._me and self._silent[rank] >= 4 * self._interval:
            return cause
        seen = "is alive" if rank == self._me else f"is heard by {self.name(self._me)}"
        why = f" ({self.name(sender)} says so, but it {seen}: look at the way between the two)"
        return replace(cause, note=cause.note + why)

    def _break(self, cause: Cause, error: RingError | None = None) -> None:
        self.cause = cause
        self.error = error or cause.error
        self._on_broken(cause)

    def fail(self, cause: Cause, error: RingError | None = None) -> None:
        """Break the ring because of `cause`, of which `error` is raised, and tell everybody. The first one stands."""
        with self._lock:
            if self.error is None:
                self._break(cause, error)
                self._tell(cause.encode(), FAIL)

    def met(self, place: Place) -> None:
        """All ranks were seen at `place`, later than any heartbeat could say."""
        self._places = dict.fromkeys(self._peers, place)

    def seen(self, peer: int) -> None:
        """Something of `peer` has arrived: it lives, however many bytes its heartbeats wait behind."""
        self._silent[peer] = 0.0

    def say_bye(self, patience: float) -> None:
        """Tell everybody that this rank leaves, and see to it for at most `patience` seconds that they are told."""
        with self._lock:
            self._said_bye = True  # the last message, so that the others know when nothing more will come
            self._tell(b"null", BYE)
        until = time.monotonic() + patience
        while not all(sent() for sent in self._outbox) and time.monotonic() < until:
            time.sleep(1e-3)

    def _tell(self, note: bytes, kind: int) -> None:
        self._outbox += [self._post.send(peer, kind, note) for peer in self._peers]

    def everybody_left(self) -> bool:
        """Whether no rank is left to wait for: each has said goodbye or, in a broken ring, has long been silent."""
        broken = self.error is not None
        return all(peer in self.left or (broken and self._silent[peer] > self._timeout) for peer in self._peers)
