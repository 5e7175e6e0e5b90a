"""How fast the links of a ring are, measured through the ring itself, one link after the other. Collective."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from statistics import median

from ..errors import RingError
from ..transport.interface import Transport

ROUNDS = 101  # of a few bytes, for the latency,
LATENCY_FOR = 0.5  # unless they take longer than so many seconds in all
LEAST, MOST = 1 << 18, 1 << 25  # bytes of one message
GROWTH = 4
LONG_ENOUGH = 0.025  # seconds; from this on a message is large enough to tell the size that is timed
TARGET = 0.1  # seconds of that
REPEATS = 3

FIRST, SECOND, BOTH = (0,), (1,), (0, 1)  # which ranks of a pair send


@dataclass(frozen=True)
class Link:
    """The link between a rank and its right neighbour.

    Attributes:
        ranks: The two.
        latency: Seconds of one small message through the ring; the median.
        to_right: Bytes per second, the left one sending.
        to_left: Bytes per second, the right one sending.
        both: Bytes per second in each direction, both sending at once.
    """

    ranks: tuple[int, int]
    latency: float
    to_right: float
    to_left: float
    both: float

    @property
    def slowest(self) -> float:
        """The least of the three bandwidths."""
        return min(self.to_right, self.to_left, self.both)


def pairs(size: int) -> list[tuple[int, int]]:
    """The ranks at the ends of each link, in the ring's order; two ranks share one link."""
    return [(rank, (rank + 1) % size) for rank in range(size if size > 2 else size - 1)]


def measure_link(ring: Transport, ranks: tuple[int, int]) -> Link | None:
    """Measure one link while all others rest. Collective over `ring`.

    Returns:
        What both ends measured; ``None`` on the other ranks.
    """
    pair = ring.split(0 if ring.rank in ranks else None)
    if pair is None:
        return None
    name = f"link {ranks[0]}-{ranks[1]}"
    right, left = (FIRST, SECOND) if ranks[0] < ranks[1] else (SECOND, FIRST)  # a split keeps the ring's order
    try:
        with pair, pair.call(name):
            return Link(ranks, _latency(pair), *(_bandwidth(pair, senders) for senders in (right, left, BOTH)))
    except RingError as error:  # it counts the ranks of the pair
        raise RingError(f"{name}: {error}", host=error.host) from error


def measure_hop(ring: Transport) -> float:
    """Bytes per second that every rank sends while all others do so too, as in a hop. Collective.

    To the right; half of them each way where `ring_attention` would do so.
    """
    with ring.call("hop of all ranks"):
        return _bandwidth(ring, tuple(range(ring.size)), (1, -1) if ring.neighbours_on_other_hosts else (1,))


def _latency(pair: Transport) -> float:
    """Both send a few bytes at once and wait for the other's, so a round takes as long as one message."""
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < ROUNDS and spent < LATENCY_FOR:
        start = time.perf_counter()
        spent = _largest(pair, sum(seconds))  # the round that is timed, and when to stop
        seconds.append(time.perf_counter() - start)
    return _largest(pair, median(seconds))


def _bandwidth(ring: Transport, senders: tuple[int, ...], steps: tuple[int, ...] = (1,)) -> float:
    """Bytes per second when these ranks send, from messages that take long enough to be timed."""
    size = LEAST
    seconds = _transfer(ring, senders, size, steps)
    while seconds < LONG_ENOUGH and size < MOST:
        size = min(MOST, size * GROWTH)
        seconds = _transfer(ring, senders, size, steps)
    size = next_size(size, seconds)
    return size / median(_transfer(ring, senders, size, steps) for _ in range(REPEATS))


def next_size(size: int, seconds: float) -> int:
    """The bytes that take about `TARGET` seconds where `size` took `seconds`."""
    return max(LEAST, min(MOST, int(size * TARGET / max(seconds, 1e-9))))


def _transfer(ring: Transport, senders: tuple[int, ...], size: int, steps: tuple[int, ...]) -> float:
    """Seconds until the last rank had sent and received all, counted by each from when all were ready.

    An equal part of the bytes goes each of the ways in `steps`.
    """
    sends = steps if ring.rank in senders else ()
    receives = [step for step in steps if (ring.rank - step) % ring.size in senders]
    # Written, not only allocated: else the first touch of every page would count.
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
    """The largest of all ranks' values: one decision everywhere."""
    return max(json.loads(bytes(told)) for told in ring.exchange([memoryview(json.dumps(value).encode())]))
