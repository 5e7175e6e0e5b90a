"""What moves over `mx.distributed` in this process, and in which order.

There is one group of processes, so there is one fabric, which all rings of the process share. Each of its lanes is a
thread that does one thing after the other: a message to a neighbour, a message from one, a gather. With a lane for each
link a rank does all four at once (two where there is but one neighbour); with one lane for all, messages go to the
right, one at a time. The main thread only waits, with open eyes.

No deadlock comes of it, as long as all ranks make the same calls:

- A message is started at one end only when both are ready for it, and both ends start theirs in one order (`pairing`).
- A lane for each link: what is before a message in a lane is of the same link, at both ends in the same order, so the
  first of a link always moves. One lane: the leader commits only when its lane is free, and `pairing.leads` says why
  the waiting for followers makes no circle.
- A gather starts when the lanes are empty of what was committed before it, and holds back what is committed after it.
  A follower that waits for the leader's word hears it, for the leader either commits or comes to the gather as well.
- Gathers that are nodes of MLX's graph depend on one another in the order of the calls, and are evaluated before
  anything else is started here.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..interface import Buffers
from . import all_gather
from .backend import Group
from .matching import Key, Link, Offer, Parcel, leads
from .worker_thread import Lane, Work

OFFER, COMMIT, PASSED, REACHED, ARRIVED = 16, 17, 18, 19, 20  # kinds of message between fabrics
LOOK_EVERY = 0.02  # s between two looks of a thread that waits

_OFFER = struct.Struct("<BIqQQ")  # whether the follower sends; channel, tag, bytes, epoch
_COMMIT = struct.Struct("<QBIqBIq")  # epoch; whether the leader sends, channel, tag; whether it receives, channel, tag
_PASSED = struct.Struct("<BQ")  # whether the leader sends; epoch
_NO_KEY: Key = (0, 0)

Tell = Callable[[int, int, bytes], object]  # peer, kind, note


class Fabric:
    """The links to the neighbours and the gathers of all.

    Args:
        group: What moves the bytes.
        tell: Sends a note to a neighbour's fabric, which gives it to its `hear`; never waits.
        on_error: Called with whatever goes wrong on another thread than the caller's.

    Attributes:
        epoch: The gathers that this rank has begun.
        reached: The gathers that ranks have finished which said so before they left.
        lock, changed: Guard all there is, and tell those who `wait`.
    """

    def __init__(self, group: Group, tell: Tell, on_error: Callable[[BaseException], None]):
        self.group, self.rank, self.size = group, group.rank, group.size
        self.epoch = 0
        self.reached: dict[int, int] = {}
        self._arrived: dict[int, int] = {}  # by rank: the gathers that need nothing from it any more but bytes
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.on_error = on_error
        self._tell = tell
        right, left = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ends = [(True, right), (False, left)]
        if group.duplex and self.size > 2:
            ends += [(True, left), (False, right)]
        self._links = {end: Link(*end, leads(self.rank, end[1], end[0], group.duplex)) for end in ends}
        self._turns = list(self._links.values())  # whose turn it is to lead, where one thing is done at a time
        self._blocked: list[Parcel] = []
        self._gathering = False  # in one, or on the way there
        self._inside = False  # in one
        self._gather_turn = threading.Lock()
        self._last: mx.array | None = None  # the gather in MLX's graph that nobody has waited for yet
        names = [f"{'to' if sending else 'from'} rank {peer}" for sending, peer in ends]
        lanes = [self._lane(name) for name in (names if group.duplex else ["moves"])]
        self._lanes = dict(zip(self._links.values(), lanes * (len(ends) // len(lanes))))
        self._gathers = lanes[0]

    def _lane(self, name: str) -> Lane:
        return Lane(name, self.lock, self._admits, self.advance, self.fail)

    # Messages

    def add(self, parcel: Parcel) -> None:
        """Move `parcel` when it and its other end are ready."""
        self.settle()
        with self.lock:
            self._blocked.append(parcel)
            self.advance()

    def advance(self) -> None:
        """Do all that can be done now: after anything has changed."""
        with self.lock:
            try:
                for parcel in [parcel for parcel in self._blocked if parcel.ready]:
                    self._blocked.remove(parcel)
                    self._make_ready(parcel)
                self._commit()
            except Exception as error:  # it must reach the peers, whichever thread this is
                self.fail(error)
            self.changed.notify_all()
            for lane in self._lanes.values():
                lane.bell.notify()

    def _make_ready(self, parcel: Parcel) -> None:
        link = self._links[parcel.sending, parcel.peer]
        parcel.load()
        link.ready.append(parcel)
        if not link.leads:
            parcel.epoch = self.epoch
            self._tell(parcel.peer, OFFER, _OFFER.pack(link.sending, *parcel.key, parcel.bytes, self.epoch))

    def _commit(self) -> None:
        """As the leader of a link, start what both ends are ready for."""
        if self._gathering:
            return
        if self.group.duplex:
            for link in self._links.values():
                while link.leads and (parcel := link.match(self.epoch)) is not None:
                    self._announce(parcel.peer, parcel, None)
                    self._push(self.epoch, parcel, None)
        elif self._gathers.idle:
            self._commit_one()

    def _commit_one(self) -> None:
        found: dict[bool, Parcel] = {}
        for link in self._turns:
            if link.leads and (parcel := link.match(self.epoch)) is not None:
                found[link.sending] = parcel
                if self.size > 2:  # with another neighbour, something else
                    break
        if found:
            self._turns.reverse()
            peer = next(iter(found.values())).peer
            self._announce(peer, found.get(True), found.get(False))
            self._push(self.epoch, found.get(True), found.get(False))

    def _announce(self, peer: int, out: Parcel | None, into: Parcel | None) -> None:
        keys = [(parcel is not None, *(_NO_KEY if parcel is None else parcel.key)) for parcel in (out, into)]
        self._tell(peer, COMMIT, _COMMIT.pack(self.epoch, *keys[0], *keys[1]))

    def _push(self, epoch: int, out: Parcel | None, into: Parcel | None) -> None:
        """Queue what was committed."""
        parcels = tuple(parcel for parcel in (out, into) if parcel is not None)

        def do(stream: Any) -> None:
            sent: Buffers = () if out is None else out.buffers
            received: Buffers = () if into is None else into.buffers
            for parcel in parcels:
                parcel.started = time.time()
            if self.size == 2 and not self.group.duplex:
                self.group.swap(sent, received, stream)
            elif out is not None:
                self.group.send(sent, out.peer, stream)
            elif into is not None:
                self.group.recv(received, into.peer, stream)

        link = self._links[parcels[0].sending, parcels[0].peer]
        self._lanes[link].add(Work(do, epoch, parcels))

    # What the neighbours say

    def hear(self, sender: int, kind: int, note: bytes) -> None:
        """Take in what the fabric of another rank has told this one."""
        with self.lock:
            if kind == OFFER:
                sending, channel, tag, count, epoch = _OFFER.unpack(note)
                link = self._links[not sending, sender]
                link.offers.append(Offer((channel, tag), count, epoch))
                self._answer()
            elif kind == COMMIT:
                epoch, sends, *sent, receives, channel, tag = _COMMIT.unpack(note)
                out = self._links[True, sender].take((channel, tag)) if receives else None
                into = self._links[False, sender].take((sent[0], sent[1])) if sends else None
                self._push(epoch, out, into)
            elif kind == PASSED:
                sending, epoch = _PASSED.unpack(note)
                self._links[not sending, sender].passed = epoch
            elif kind == ARRIVED:
                self._arrived[sender] = struct.unpack("<Q", note)[0]
            elif kind == REACHED:
                self.reached[sender] = struct.unpack("<Q", note)[0]
            self.advance()

    def _answer(self) -> None:
        """As a leader, tell followers that have offers from before a gather that this rank has come to it."""
        if self._gathering:
            for link in self._links.values():
                if link.leads and link.due(self.epoch):
                    self._tell(link.peer, PASSED, _PASSED.pack(link.sending, self.epoch))

    # Gathers

    def exchange(self, channel: int, payload: Buffers, wait: Callable[[Callable[[], bool]], None]) -> list[memoryview]:
        """Every rank's payload, on every rank: one gather, and a second one if any is longer than a frame holds.

        Args:
            channel: Of the ring whose round it is.
            payload: This rank's bytes.
            wait: Returns when what it is given says True, and raises when that will not come.
        """
        self.settle()
        with self._gather_turn:
            self._begin()
            wait(lambda: self._quiet)
            epoch, data = self.epoch, b"".join(payload)
            work = Work(lambda stream: all_gather.gather(self.group, channel, epoch, data, stream), None)
            with self.lock:
                self._inside = True
                self._gathers.add(work)
            wait(lambda: work.done)
            self._end()
        replies: list[memoryview] = work.result
        return replies

    def _begin(self) -> None:
        with self.lock:
            self.epoch += 1
            self._gathering = True
            self._answer()

    def _end(self) -> None:
        with self.lock:
            self._gathering = self._inside = False
            self.advance()

    @property
    def _quiet(self) -> bool:
        return all(link.quiet(self.epoch) and lane.empty_before(self.epoch) for link, lane in self._lanes.items())

    def _admits(self, work: Work) -> bool:
        """Whether a lane may start `work` now, or only after the gather that this rank is in."""
        return work.epoch is None or not self._gathering or work.epoch < self.epoch

    # Gathers in MLX's graph

    def exchange_in_graph(
        self, channel: int, payload: mx.array, wait: Callable[[Callable[[], bool]], None]
    ) -> mx.array:
        """The same for a payload of at most `frames.INLINE_BYTES`, as a node of MLX's graph.

        It is the same gather on the link as `exchange` makes, so one rank may be in the one and another in the other.
        `frames.gather_in_graph` says what is returned.
        """
        with self._gather_turn:
            self._begin()
            wait(lambda: self._quiet)
            # What is not known to have been evaluated comes before: the order is the calls'.
            self._last, replies = all_gather.gather_in_graph(self.group, channel, self.epoch, payload, self._last)
            return replies

    @property
    def pending(self) -> bool:
        """Whether a gather in MLX's graph may have to be evaluated yet."""
        return self._last is not None

    def settle(self) -> None:
        """Evaluate the gathers in MLX's graph, so that something else can move."""
        if self._last is not None:
            self._inside = True
            mx.eval(self._last)
            self._last = None
            self._end()

    # Watching over it

    def say_where(self) -> None:
        """Tell all others which gathers this rank holds up no longer."""
        arrived = self.epoch - (self._gathering and not self._inside)
        for peer in range(self.size):
            if peer != self.rank:
                self._tell(peer, ARRIVED, struct.pack("<Q", arrived))

    def moving(self, channel: int) -> list[Parcel]:
        """The messages of a ring that are on the link, at both ends."""
        with self.lock:
            works = [lane.doing for lane in set(self._lanes.values()) if lane.doing is not None]
            return [parcel for work in works for parcel in work.parcels if parcel.key[0] == channel]

    @property
    def gather_moving(self) -> int | None:
        """The gather that all ranks are in, or past."""
        everybody = all(self._arrived.get(peer, 0) >= self.epoch for peer in range(self.size) if peer != self.rank)
        return self.epoch if self._inside and everybody else None

    # Waiting

    def wait(self, poll: Callable[[], bool], look: Callable[[], None]) -> None:
        """Return when `poll` says True; `look`, which may raise, is called now and then."""
        while True:
            with self.lock:
                if self.changed.wait_for(poll, LOOK_EVERY):
                    return
            look()

    def fail(self, error: BaseException) -> None:
        """Nothing goes on from here."""
        self.on_error(error)
        with self.lock:
            self.changed.notify_all()

    def missing(self, channel: int) -> set[int]:
        """The ranks that have to do something for a message of a ring to be committed."""
        with self.lock:
            return {parcel.peer for link in self._lanes for parcel in link.ready if parcel.key[0] == channel}

    def behind(self) -> set[int]:
        """The ranks that the present gather may still need."""
        return {peer for peer in range(self.size) if peer != self.rank and self.reached.get(peer, 0) < self.epoch}
