"""What a ring has learnt of how fast its link is, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable

POLL = 2e-4  # s between two looks at messages under way, as long as nothing is known of the link
LONGEST_POLL = 4e-3  # s
LOOK_BYTES = 64 << 10  # that may gather between two looks: less than any system buffers for a connection
TELLING_BYTES = 1 << 20  # of a message whose time is that of its bytes
UNKNOWN = 1e7  # bytes/s, until one has passed: a tenth of the slowest cable
SLOWER = 10  # times slower than before a link may be, and counts as alive


class LinkRate:
    """The rate of the messages that have passed, in bytes/s."""

    def __init__(self) -> None:
        self._rate = 0.0

    def learn(self, count: int, seconds: float) -> None:
        """A message of `count` bytes has taken `seconds`, perhaps because its other end was late."""
        if count >= TELLING_BYTES:
            self._rate = max(count / max(seconds, 1e-6), self._rate / 2)

    def nap(self, counts: Iterable[int]) -> float:
        """How often to look at messages of so many bytes for a thread that another one computes beside: seconds.

        The two share a core for all it knows, a look costs tens of microseconds, and a slow link needs few.
        """
        if not self._rate:
            return POLL
        least = min(counts, default=0) / 8  # a short one is worth nothing late
        return min(max(POLL, min(LOOK_BYTES, least) / self._rate), LONGEST_POLL)

    def deadline(self, count: int, timeout: float) -> float:
        """Seconds after which `count` bytes that both ends are moving will not arrive any more."""
        return timeout + SLOWER * count / (self._rate or UNKNOWN)
