"""The caches of earlier requests, for those that go on from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..sharding.history import shared_length

Cache = list[Any]  # of all layers


class KeptCaches:
    """At most `size` caches with the tokens they hold, the latest first.

    A cache is handed over and not copied: a long context is there once. With the same calls in the same order, every
    rank comes to the same decisions.
    """

    def __init__(self, size: int):
        self._size = size
        self._held: list[tuple[list[int], Cache]] = []

    def __len__(self) -> int:
        return len(self._held)

    def take(self, ids: Sequence[int]) -> tuple[Cache | None, int]:
        """A cache that holds the first tokens of `ids`, all but the last at most, and how many; it is no longer here.

        One of which less than half would be of use stays for its own conversation.
        """
        best, most = None, 0
        for entry in self._held:
            tokens, cache = entry
            n = min(shared_length(tokens, ids), len(ids) - 1)
            usable = n == len(tokens) or (2 * n >= len(tokens) and all(c.is_trimmable() for c in cache))
            if usable and n > most:
                best, most = entry, n
        if best is None:
            return None, 0
        self._held.remove(best)
        for c in best[1]:
            c.trim(len(best[0]) - most)
        return best[1], most

    def give(self, ids: Sequence[int], cache: Cache) -> None:
        """Keep `cache`, which holds the tokens of `ids`, and perhaps some after them."""
        surplus = cache[0].size() - len(ids)
        if not ids or surplus < 0 or (surplus and not all(c.is_trimmable() for c in cache)):
            return
        for c in cache:
            c.trim(surplus)
        self._held.insert(0, (list(ids), cache))
        del self._held[self._size :]
