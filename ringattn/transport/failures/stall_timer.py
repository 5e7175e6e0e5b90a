"""A timer for messages that both ends of a link are moving, but of which no byte moves."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple


class Moving(NamedTuple):
    """A message, or the rest of one, that both ends are moving.

    Attributes:
        key: Identifies it; changes as soon as a part of it has passed.
        sending: Whether this rank sends it.
        peer: The other rank.
        bytes: The size of its next part.
    """

    key: object
    sending: bool
    peer: int
    bytes: int


class StallTimer:
    """Measures how long each key has been present, in seconds that this process was awake.

    Args:
        interval: Seconds between two calls of `look`. Of a later call only twice that counts.
    """

    def __init__(self, interval: float):
        self._interval = interval
        self._looked = time.monotonic()
        self._ages: dict[object, float] = {}

    def look(self, keys: Iterable[object]) -> dict[object, float]:
        """The seconds for which each of `keys` has been present in every call."""
        now = time.monotonic()
        awake = min(now - self._looked, 2 * self._interval)
        self._looked = now
        self._ages = {key: self._ages.get(key, -awake) + awake for key in keys}
        return self._ages
