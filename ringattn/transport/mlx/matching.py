"""How the two ends of a link agree which message moves next. Pure: no sockets, no threads, no MLX.

`mx.distributed` has no tags: what one end sends next is what the other must receive next. So both ends name a message
before it moves. One end of each link *leads*. The other offers every message as soon as it could move there ("I can
send, or receive, so many bytes under this key"); when the leader can too, it commits the message and tells the other,
and from then on both do it in the order of the commitments.

Blocks share the links with gathers, which all ranks do at the same point of their program, counted by an *epoch*. A
message moves either before a gather on both ends or after it on both: the leader commits nothing once it has begun the
gather, and the follower waits, if it has offers from before, until the leader has either committed them or said that it
has passed on to the gather (`due`). Nobody who has no such offer waits for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import RingError
from ..interface import Buffers, Signal, Transfer

Key = tuple[int, int]  # the channel of a ring, and a tag


class Offer(NamedTuple):
    """What a follower has said that it can do; `epoch` is that of the follower."""

    key: Key
    bytes: int
    epoch: int


class Parcel(Transfer):
    """A message that this rank sends or receives: blocked until all of `after` are done, then ready, then done."""

    def __init__(
        self,
        sending: bool,
        peer: int,
        key: Key,
        load: Callable[[], Buffers],
        after: Sequence[Transfer | Signal],
        on_done: Callable[[Parcel], None],
    ):
        self.sending, self.peer, self.key, self.on_done = sending, peer, key, on_done
        self.after = list(after)
        self.buffers: Buffers = ()
        self.bytes = 0
        self.epoch = -1  # of the offer that was made for it
        self.started = 0.0
        self.is_done = False
        self._load: Callable[[], Buffers] | None = load

    @property
    def done(self) -> bool:
        return self.is_done

    @property
    def ready(self) -> bool:
        while self.after and self.after[-1].done:
            self.after.pop()
        return not self.after

    def load(self) -> None:
        """Get hold of the buffers, which may only be done when it is ready."""
        assert self._load is not None
        self.buffers, self._load = self._load(), None
        self.bytes = sum(map(len, self.buffers))

    def finish(self) -> None:
        """It has moved."""
        self.buffers = ()
        self.is_done = True
        self.on_done(self)


class Link:
    """One direction between two neighbours, seen from one of its ends.

    Attributes:
        sending: Whether this rank is the one that sends on it.
        peer: The rank at its other end.
        leads: Whether this end leads.
        ready: Messages that could move, and are not committed.
        offers: What the follower has offered, where this end leads.
        passed: The epoch of the last gather that the leader has said to have passed on to, where this end follows.
    """

    def __init__(self, sending: bool, peer: int, leads: bool):
        self.sending, self.peer, self.leads = sending, peer, leads
        self.ready: list[Parcel] = []
        self.offers: list[Offer] = []
        self.passed = 0
        self._told = 0

    def match(self, epoch: int) -> Parcel | None:
        """Lead: the message to commit next, if there is one that both ends can move.

        Raises:
            RingError: The two ends mean messages of different sizes.
        """
        for parcel in self.ready:
            offer = next((offer for offer in self.offers if offer.key == parcel.key), None)
            if offer is None or offer.epoch > epoch:  # of after a gather that this rank has not come to
                continue
            if offer.bytes != parcel.bytes:
                raise RingError(self._mismatch(parcel, offer), rank=parcel.peer)
            self.ready.remove(parcel)
            self.offers.remove(offer)
            return parcel
        return None

    def _mismatch(self, parcel: Parcel, offer: Offer) -> str:
        sent, expected = (parcel.bytes, offer.bytes) if self.sending else (offer.bytes, parcel.bytes)
        who = "this rank" if self.sending else f"rank {parcel.peer}"
        return f"{who} sent {sent} bytes where {expected} were expected (tag {parcel.key[1]})"

    def take(self, key: Key) -> Parcel:
        """Follow: the message that the leader has committed."""
        parcel = next(parcel for parcel in self.ready if parcel.key == key)
        self.ready.remove(parcel)
        return parcel

    def due(self, epoch: int) -> bool:
        """Lead: whether the follower has to be told, once, that this rank has passed on to gather `epoch`."""
        if self._told >= epoch or all(offer.epoch >= epoch for offer in self.offers):
            return False
        self._told = epoch
        return True

    def quiet(self, epoch: int) -> bool:
        """Whether no message can be committed on it any more before gather `epoch`, which this rank has come to."""
        return self.leads or self.passed >= epoch or all(parcel.epoch >= epoch for parcel in self.ready)


def leads(rank: int, peer: int, sending: bool, duplex: bool) -> bool:
    """Whether `rank` leads the link on which it sends to `peer`, or receives from it.

    Where a rank can send and receive at once, links do not wait for one another, and the sender leads. Where it does
    one thing at a time, the one who commits waits for the other to be free. Even ranks lead, and of two even ones the
    lower (0 and the last of an odd ring): all wait for ranks that are later in the order "even before odd, low before
    high", so there is no circle, and as many pairs as can be are busy at once.
    """
    if duplex:
        return sending
    return (rank % 2, rank) < (peer % 2, peer)
