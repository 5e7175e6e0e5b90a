"""Who is alive: heartbeats, goodbyes and news of failures, on a communicator of their own.

Every rank's helper thread sends every other rank a small message now and then, so that a rank that computes for an hour
is known to be alive and one that stopped is not. Nothing is posted in advance (messages are probed for), so nothing has
to be cancelled when a process ends.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import RingError

BEAT, BYE, FAIL = 1, 2, 3  # message tags
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
        comm: The communicator for these messages alone.
        hosts: The host name of every rank.
        timeout: Seconds of silence after which a rank counts as dead.
        interval: Seconds between two heartbeats.
        place: Says what this rank is doing.
        status: An MPI status object to use.
    """

    def __init__(
        self,
        comm: Any,
        hosts: tuple[str, ...],
        timeout: float,
        interval: float,
        place: Callable[[], Place],
        status: Any,
    ):
        self.error: RingError | None = None
        self.left: set[int] = set()
        self._comm, self._hosts, self._timeout, self._interval, self._place = comm, hosts, timeout, interval, place
        self._status = status
        self._peers = [rank for rank in range(len(hosts)) if rank != comm.Get_rank()]
        self._silent = dict.fromkeys(self._peers, 0.0)  # seconds of this process's own waking time
        self._places: dict[int, Place] = dict.fromkeys(self._peers, ("", 0))
        self._sending: dict[int, tuple[Any, bytes]] = {}
        self._outbox: list[tuple[Any, bytes]] = []  # goodbyes and failures still leaving
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
            note = json.dumps(self._place()).encode()
            for peer in [] if self._said_bye else self._peers:
                # One that does not drain its messages gets no more of them.
                if peer not in self._sending or self._sending[peer][0].Test():
                    self._sending[peer] = (self._comm.Isend(note, peer, BEAT), note)
            self._judge()

    def _judge(self) -> None:
        now = time.monotonic()
        # A process that was itself stopped or suspended finds everybody silent: only its waking time counts.
        awake = min(now - self._ticked, 2 * self._interval)
        self._ticked = now
        for peer in self._peers:
            self._silent[peer] += awake
            if self._silent[peer] > self._timeout and peer not in self.left and self.error is None:
                what, hop = self._places[peer]
                text = f"{self.name(peer)} gave no sign of life for {self._timeout:g} s"
                heard = f"; it was last heard of {describe((what, hop))}"
                self.fail(RingError(text + heard, rank=peer, host=self._hosts[peer], hop=hop))

    # What both threads do

    def hear(self) -> None:
        """Take in what the others have said."""
        if not self._lock.acquire(blocking=False):
            return  # the other thread is at it
        try:
            while (message := self._comm.Improbe(status=self._status)) is not None:
                self._take(message)
        finally:
            self._lock.release()

    def _take(self, message: Any) -> None:
        sender, tag = self._status.Get_source(), self._status.Get_tag()
        text = bytearray(self._status.Get_count())
        message.Recv(text)
        said = json.loads(text)
        self._silent[sender] = 0.0
        if tag == BEAT:
            self._places[sender] = (said[0], said[1])
        elif tag == BYE:
            self.left.add(sender)
        elif self.error is None:
            self.error = RingError(said["text"], rank=said["rank"], host=said["host"], hop=said["hop"])

    def fail(self, error: RingError) -> None:
        """Break the ring because of `error`, and tell everybody. The first error stands."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            note = {"text": str(error)[:_LONGEST_TEXT], "rank": error.rank, "host": error.host, "hop": error.hop}
            self._tell(json.dumps(note).encode(), FAIL)

    def say_bye(self, patience: float) -> None:
        """Tell everybody that this rank leaves, and see to it for at most `patience` seconds that they are told."""
        with self._lock:
            self._said_bye = True  # the last message, so that the others know when the communicator is silent
            self._tell(b"null", BYE)
        until = time.monotonic() + patience
        while not all(request.Test() for request, _ in self._outbox) and time.monotonic() < until:
            time.sleep(1e-3)

    def _tell(self, note: bytes, tag: int) -> None:
        for peer in self._peers:
            self._outbox.append((self._comm.Isend(note, peer, tag), note))

    def everybody_left(self) -> bool:
        """Whether no rank is left to wait for: each has said goodbye or, in a broken ring, has long been silent."""
        broken = self.error is not None
        return all(peer in self.left or (broken and self._silent[peer] > self._timeout) for peer in self._peers)
