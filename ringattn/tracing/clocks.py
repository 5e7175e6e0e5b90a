"""Alignment of the clocks of several hosts, from rounds of messages.

In a round every rank sends its time to all others and notes when it has the messages of all. As in NTP (RFC 5905), a
message cannot arrive before it was sent. With the clocks of ranks 0 and r, where rank r is ahead by x seconds::

    received by r  >=  sent by 0 + x          so   x  <=  done by r - sent by 0
    received by 0  >=  sent by r - x          so   x  >=  sent by r - done by 0

Each round bounds x on both sides. The narrowest bounds of all rounds are kept. Their middle is the estimate, and half
of their distance is its largest error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Offset(NamedTuple):
    """Seconds by which a rank's clock is ahead of rank 0's, at a time of the rank's clock, and the largest error."""

    at: float
    seconds: float
    error: float


def estimate_offsets(sent: Sequence[Sequence[float]], done: Sequence[Sequence[float]]) -> list[Offset]:
    """Estimate the offset of each rank.

    Args:
        sent: Times at which the ranks began each round, ``[round][rank]``, each by the rank's own clock.
        done: Times at which the ranks had the messages of all others, in the same form.
    """
    offsets = []
    for rank in range(len(sent[0])):
        most = min(end[rank] - begin[0] for begin, end in zip(sent, done))
        least = max(begin[rank] - end[0] for begin, end in zip(sent, done))
        middle = (most + least) / 2 if rank else 0.0
        offsets.append(Offset(done[-1][rank], middle, (most - least) / 2 if rank else 0.0))
    return offsets


def to_first_clock(time: float, offsets: Sequence[Offset]) -> float:
    """Convert a rank's time to the clock of rank 0. Between two measured offsets the clocks drift evenly."""
    first, last = offsets[0], offsets[-1]
    if last.at == first.at:
        return time - last.seconds
    part = min(1.0, max(0.0, (time - first.at) / (last.at - first.at)))
    return time - (first.seconds + part * (last.seconds - first.seconds))
