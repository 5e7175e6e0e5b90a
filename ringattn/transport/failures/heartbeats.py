"""Who is alive: heartbeats, goodbyes and news of failures, by a post of their own.

Every rank's helper thread sends every other rank a small message now and then, so that a rank that computes for an hour
is known to be alive and one that stopped is not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from ...errors import RingError
from .control_channel import BEAT, BYE, FAIL, LOST, Post, Sent

GRACE = 0.2  # s in which messages may still arrive that a rank sent before its goodbye
_LONGEST_TEXT = 4000  # characters of an error that travel; short messages need no answer from the receiver

Place = tuple[str, int]  # what a rank is doing: (call, hop)


def describe(place: Place) -> str:
    """`place` in words, to go behind "failed" or "last heard of"."""
    what, hop = place
    if not what:
        return "before its first call"
    return what if what.startswith("after ") else f"in {what}, hop {hop}"


class Liveness:
    """What this rank knows about the others, and what it tells them.

    Args:
        post: Where messages go and come from.
        rank: This rank.
        hosts: The host name of every rank.
        timeout: Seconds of silence after which a rank counts as dead.
        interval: Seconds between two heartbeats.
        place: Says what this rank is doing.
        moving: Says which messages to or from a rank are under way here, in lists that JSON can hold.
        on_broken: Called with what broke the ring, once.
    """

    def __init__(
        self,
        post: Post,
        rank: int,
        hosts: tuple[str, ...],
        timeout: float,
        interval: float,
        place: Callable[[], Place],
        moving: Callable[[int], list[list]],
        on_broken: Callable[[RingError], None],
    ):
        self.error: RingError | None = None
        self.exit_code = 1  # of a process that ends because of it
        self.left: set[int] = set()
        self._post, self._hosts, self._timeout, self._interval, self._place = post, hosts, timeout, interval, place
        self._me, self._moving, self._on_broken = rank, moving, on_broken
        self._peers = [peer for peer in range(len(hosts)) if peer != rank]
        self._silent = dict.fromkeys(self._peers, 0.0)  # seconds of this process's own waking time
        self._places: dict[int, Place] = dict.fromkeys(self._peers, ("", 0))
        self.moving: dict[int, list[list]] = {}  # what each rank has said last of its messages to and from this one
        self._sending: dict[int, Sent] = {}
        self._outbox: list[Sent] = []  # goodbyes and failures still leaving
        self._said_bye = False
        self._ticked = time.monotonic()
        self._lock = threading.RLock()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"

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
        for peer in self._peers:
            self._silent[peer] += awake
            if self._silent[peer] > self._timeout and peer not in self.left and self.error is None:
                self._mourn(peer, f"gave no sign of life for {self._timeout:g} s", silent=True)

    def _mourn(self, peer: int, how: str, silent: bool = False) -> None:
        what, hop = self._places[peer]
        text = f"{self.name(peer)} {how}; it was last heard of {describe((what, hop))}"
        self.fail(RingError(text, rank=peer, host=self._hosts[peer], hop=hop), silent=silent)

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
                self._mourn(sender, "died: its connection was closed")
            self.left.add(sender)  # it will say no goodbye any more
            return
        said = json.loads(note)
        self._silent[sender] = 0.0
        if kind == BEAT:
            self._places[sender] = (said[0], said[1])
            self.moving[sender] = said[2]
        elif kind == BYE:
            self.left.add(sender)
        elif self.error is None:
            text, rank = said["text"], said["rank"]
            if said["silent"] and self._hears(rank):
                seen = "is alive" if rank == self._me else f"is heard by {self.name(self._me)}"
                text += f" ({self.name(sender)} says so, but it {seen}: look at the way between the two)"
            self.exit_code = said["exit_code"]
            self._break(RingError(text, rank=rank, host=said["host"], hop=said["hop"]))

    def _hears(self, rank: int) -> bool:
        """Whether `rank` has told of itself of late: this rank itself, or one that is heard."""
        return rank == self._me or self._silent[rank] < 4 * self._interval

    def _break(self, error: RingError) -> None:
        self.error = error
        self._on_broken(error)

    def fail(self, error: RingError, exit_code: int = 1, silent: bool = False) -> None:
        """Break the ring because of `error`, and tell everybody. The first error stands.

        `exit_code` is that of the rank that failed. All end with it, for any of them may be the first to be seen.
        `silent` says that a rank is accused of silence, which others may know better.
        """
        with self._lock:
            if self.error is not None:
                return
            self.exit_code = exit_code
            self._break(error)
            about = {"rank": error.rank, "host": error.host, "hop": error.hop, "exit_code": exit_code, "silent": silent}
            self._tell(json.dumps({"text": str(error)[:_LONGEST_TEXT], **about}).encode(), FAIL)

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
