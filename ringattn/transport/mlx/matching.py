"""ScoreRules by which the two ends of a link agree on the next message. Pure: no sockets, no threads, no MLX.

`mx.distributed` has no tags: the next message that one end sends is the next one that the other end must receive. So
both ends name a message before it moves. One end of each link *leads*, the other *follows*. The follower offers every
message as soon as it can move there: an offer names the message by its key and gives its size. When the message can
move at the leader too, the leader commits it and notifies the follower. Both ends then move messages in the order of
the commits.

Messages share the links with gathers. All ranks make each gather at the same point of their program, and an *epoch*
counts the gathers. A message moves before a gather on both ends, or after it on both. So the leader commits nothing
once it has begun the gather. A follower with offers from before the gather waits until the leader has committed them
or has announced the epoch of the gather (`Link.must_announce_epoch`). A follower without such offers does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import RingError
from ..interface import Buffers, Signal, Transfer

Key = tuple[int, int]  # the channel of a ring, and a tag


class Offer(NamedTuple):
    """A message that can move at the follower.

    Attributes:
        key: The key of the message.
        bytes: The size of the message.
        epoch: The follower's epoch at the time of the offer.
    """

    key: Key
    bytes: int
    epoch: int


class PendingMessage(Transfer):
    """A message that this rank sends or receives: blocked until all of `after` are done, then ready, then done."""

    def __init__(
        self,
        sending: bool,
        peer: int,
        key: Key,
        load: Callable[[], Buffers],
        after: Sequence[Transfer | Signal],
        on_done: Callable[[PendingMessage], None],
    ):
        self.sending = sending
        self.peer = peer
        self.key = key
        self.after = list(after)
        self.on_done = on_done
        self.buffers: Buffers = ()
        self.bytes = 0
        self.epoch = -1  # of its offer
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
        """Load the buffers. Call this only on a ready message."""
        assert self._load is not None
        self.buffers = self._load()
        self._load = None
        self.bytes = sum(map(len, self.buffers))

    def finish(self) -> None:
        """Mark the message as done and release its buffers."""
        self.buffers = ()
        self.is_done = True
        self.on_done(self)


class Link:
    """One direction between two neighbours, as one of its ends sees it.

    Attributes:
        sending: Whether this rank sends on the link.
        peer: The rank at the other end.
        leads: Whether this end leads.
        ready: Messages that can move here and are not committed.
        offers: Leader: the follower's offers that are not committed.
        leader_epoch: Follower: the epoch that the leader announced last.
    """

    def __init__(self, sending: bool, peer: int, leads: bool):
        self.sending = sending
        self.peer = peer
        self.leads = leads
        self.ready: list[PendingMessage] = []
        self.offers: list[Offer] = []
        self.leader_epoch = 0
        self._announced_epoch = 0

    def match(self, epoch: int) -> PendingMessage | None:
        """Leader: take the next message that both ends can move; ``None`` if there is none.

        Raises:
            RingError: If the two ends name different sizes for the message.
        """
        for message in self.ready:
            offer = next((offer for offer in self.offers if offer.key == message.key), None)
            if offer is None or offer.epoch > epoch:  # an offer from after a gather that this rank has not begun
                continue
            if offer.bytes != message.bytes:
                raise RingError(self._size_mismatch(message, offer), rank=message.peer)
            self.ready.remove(message)
            self.offers.remove(offer)
            return message
        return None

    def _size_mismatch(self, message: PendingMessage, offer: Offer) -> str:
        sent, expected = (message.bytes, offer.bytes) if self.sending else (offer.bytes, message.bytes)
        sender = "this rank" if self.sending else f"rank {message.peer}"
        return f"{sender} sent {sent} bytes where {expected} were expected (tag {message.key[1]})"

    def take(self, key: Key) -> PendingMessage:
        """Follower: take the message that the leader has committed."""
        message = next(message for message in self.ready if message.key == key)
        self.ready.remove(message)
        return message

    def must_announce_epoch(self, epoch: int) -> bool:
        """Leader: whether the follower waits for the announcement that this rank has begun gather `epoch`.

        A second call for the same epoch returns False, because the caller announces it after the first.
        """
        if self._announced_epoch >= epoch or all(offer.epoch >= epoch for offer in self.offers):
            return False
        self._announced_epoch = epoch
        return True

    def drained_before(self, epoch: int) -> bool:
        """Whether no more message can be committed here before gather `epoch`, which this rank has begun."""
        return self.leads or self.leader_epoch >= epoch or all(message.epoch >= epoch for message in self.ready)


def leads(rank: int, peer: int, sending: bool, duplex: bool) -> bool:
    """Return whether `rank` leads the link on which it sends to `peer` (`sending`), or receives from it.

    Where a rank can send and receive at the same time, links do not wait for one another, and the sender leads.

    Where a rank does one thing at a time, the rank that commits waits until the other one is free. Even ranks lead
    odd ones. Of two even ranks (0 and the last of an odd ring) the lower leads. So every rank waits only for ranks
    that are later in the order "even before odd, low before high": there is no cycle, and as many pairs as possible
    are busy at the same time.
    """
    if duplex:
        return sending
    return (rank % 2, rank) < (peer % 2, peer)
