"""Speed of the links of a ring, measured through the ring itself, one link after the other. Collective."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from statistics import median

from ..errors import RingError
from ..transport.interface import Transport

ROUNDS = 101  # of a few bytes, for the latency
LATENCY_LIMIT = 0.5  # s after which no further round starts
LEAST = 1 << 18  # bytes of a message
MOST = 1 << 25  # bytes of a message
GROWTH = 4
LONG_ENOUGH = 0.025  # s of a message whose bandwidth determines the size of the measured messages
TARGET = 0.1  # s of a measured message
REPEATS = 3

# Ranks of a pair that send.
FIRST = (0,)
SECOND = (1,)
BOTH = (0, 1)


@dataclass(frozen=True)
class LinkSpeed:
    """Speed of the link between a rank and its right neighbour.

    Attributes:
        ranks: The two ranks.
        latency: Median seconds of one small message through the ring.
        to_right: Bytes per second while the left rank sends.
        to_left: Bytes per second while the right rank sends.
        both: Bytes per second in each direction while both ranks send.
    """

    ranks: tuple[int, int]
    latency: float
    to_right: float
    to_left: float
    both: float

    @property
    def slowest(self) -> float:
        """Smallest of the three bandwidths."""
        return min(self.to_right, self.to_left, self.both)


def pairs(size: int) -> list[tuple[int, int]]:
    """Ranks at the ends of each link, in the ring's order. A ring of two ranks has one link."""
    return [(rank, (rank + 1) % size) for rank in range(size if size > 2 else size - 1)]


def measure_link(ring: Transport, ranks: tuple[int, int]) -> LinkSpeed | None:
    """Measure one link while all others are idle. Collective over `ring`.

    Returns:
        The speed of the link on its two ranks; ``None`` on the other ranks.
    """
    pair = ring.split(0 if ring.rank in ranks else None)
    if pair is None:
        return None
    name = f"link {ranks[0]}-{ranks[1]}"
    right, left = (FIRST, SECOND) if ranks[0] < ranks[1] else (SECOND, FIRST)  # a split keeps the order of the ring
    try:
        with pair, pair.call(name):
            return LinkSpeed(ranks, _latency(pair), *(_bandwidth(pair, senders) for senders in (right, left, BOTH)))
    except RingError as error:  # its rank numbers are those of the pair
        raise RingError(f"{name}: {error}", host=error.host) from error


def measure_hop(ring: Transport) -> float:
    """Bytes per second that every rank sends while all send, as in a hop. Collective.

    Ranks send to the right, or half each way where `ring_attention` does.
    """
    with ring.call("hop of all ranks"):
        return _bandwidth(ring, tuple(range(ring.size)), (1, -1) if ring.neighbours_on_other_hosts else (1,))


def _latency(pair: Transport) -> float:
    """Median seconds of a message of a few bytes.

    Both ranks send at once and wait for the other's message. A round therefore takes as long as one message.
    """
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < ROUNDS and spent < LATENCY_LIMIT:
        start = time.perf_counter()
        spent = _largest(pair, sum(seconds))  # the timed round, which also makes both ranks stop together
        seconds.append(time.perf_counter() - start)
    return _largest(pair, median(seconds))


def _bandwidth(ring: Transport, senders: tuple[int, ...], steps: tuple[int, ...] = (1,)) -> float:
    """Bytes per second while `senders` send messages that take long enough to time."""
    size = LEAST
    seconds = _transfer(ring, senders, size, steps)
    while seconds < LONG_ENOUGH and size < MOST:
        size = min(MOST, size * GROWTH)
        seconds = _transfer(ring, senders, size, steps)
    size = next_size(size, seconds)
    return size / median(_transfer(ring, senders, size, steps) for _ in range(REPEATS))


def next_size(size: int, seconds: float) -> int:
    """Number of bytes that take about `TARGET` seconds where `size` bytes take `seconds`."""
    return max(LEAST, min(MOST, int(size * TARGET / max(seconds, 1e-9))))


def _transfer(ring: Transport, senders: tuple[int, ...], size: int, steps: tuple[int, ...]) -> float:
    """Seconds from the moment when all ranks are ready until the last rank has sent and received everything.

    An equal part of the bytes goes in each direction of `steps`.
    """
    sends = steps if ring.rank in senders else ()
    receives = [step for step in steps if (ring.rank - step) % ring.size in senders]
    # The buffers are written here, so that the time does not include the first access to each page.
    out, into = (
        {step: memoryview(bytearray(b"x") * (size // len(steps))) for step in used} for used in (sends, receives)
    )
    ring.exchange([])
    start = time.perf_counter()
    transfers = [ring.recv([into[step]], tag=0, step=step) for step in receives]
    transfers += [ring.send(partial(list, [out[step]]), tag=0, step=step) for step in sends]
    ring.wait(*transfers)
    return _largest(ring, time.perf_counter() - start)


def _largest(ring: Transport, value: float) -> float:
    """Largest of all ranks' values. All ranks decide by it in the same way."""
    return max(json.loads(bytes(reply)) for reply in ring.exchange([memoryview(json.dumps(value).encode())]))
