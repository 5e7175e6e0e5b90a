"""The measured bandwidth of a ring's links, and the poll intervals and deadlines that follow from it."""

from __future__ import annotations

from collections.abc import Iterable

POLL = 2e-4  # s between two polls of messages under way, until the link's rate is known
LONGEST_POLL = 4e-3  # s
POLL_BYTES = 64 << 10  # that may arrive between two polls: less than any system buffers for a connection
TIMED_BYTES = 1 << 20  # of a message long enough for its time to depend on its bytes
UNKNOWN = 1e7  # bytes/s, until a message has been timed: a tenth of the slowest cable
SLOWER = 10  # times slower than before a link may be without counting as dead


class LinkRate:
    """The rate of the messages that have passed, in bytes/s."""

    def __init__(self) -> None:
        self._rate = 0.0

    def learn(self, count: int, seconds: float) -> None:
        """Record that a message of `count` bytes took `seconds`, perhaps because its other end was late."""
        if count >= TIMED_BYTES:
            self._rate = max(count / max(seconds, 1e-6), self._rate / 2)

    def poll_interval(self, counts: Iterable[int]) -> float:
        """Seconds between two polls of messages of so many bytes, while another thread computes.

        The two threads may share a core, and a poll costs tens of microseconds. A slow link needs few.
        """
        if not self._rate:
            return POLL
        least = min(counts, default=0) / 8  # a short message must not wait long for its poll
        return min(max(POLL, min(POLL_BYTES, least) / self._rate), LONGEST_POLL)

    def deadline(self, count: int, timeout: float) -> float:
        """Seconds after which `count` bytes that both ends are moving count as stuck."""
        return timeout + SLOWER * count / (self._rate or UNKNOWN)
