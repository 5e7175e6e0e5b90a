"""What both ends of a link are moving, and for how long nothing of it has moved."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple


class Moving(NamedTuple):
    """A message, or what is left of it, that both ends are moving.

    Attributes:
        key: What it is known by; another one as soon as some of it has passed.
        sending: Whether this rank sends it.
        peer: The other rank.
        bytes: How much of it comes next.
    """

    key: object
    sending: bool
    peer: int
    bytes: int


class Watch:
    """Takes the time, of which this process was awake, since each of several things was first seen.

    Args:
        interval: Seconds between two looks. One that comes later than twice that was held up.
    """

    def __init__(self, interval: float):
        self._interval, self._looked = interval, time.monotonic()
        self._ages: dict[object, float] = {}

    def look(self, keys: Iterable[object]) -> dict[object, float]:
        """The seconds since each of `keys` was first there without a break."""
        now = time.monotonic()
        awake, self._looked = min(now - self._looked, 2 * self._interval), now
        self._ages = {key: self._ages.get(key, -awake) + awake for key in keys}
        return self._ages
