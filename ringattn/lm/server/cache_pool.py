"""A pool of the caches of earlier requests, for requests with the same beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..sharding.history import shared_length

Cache = list[Any]  # one cache a layer


class PromptCachePool:
    """At most `size` caches with the tokens that they hold, the latest first.

    A cache moves in and out and is never copied, so a long context is in memory once. With the same calls in the same
    order, every rank makes the same decisions.
    """

    def __init__(self, size: int):
        self._size = size
        self._held: list[tuple[list[int], Cache]] = []

    def __len__(self) -> int:
        return len(self._held)

    def pop(self, ids: Sequence[int]) -> tuple[Cache | None, int]:
        """Remove and return the cache with the most first tokens of `ids`, at most all but the last, and their number.

        A cache that would lose more than half of its tokens stays, for its own conversation.
        """
        best = None
        most = 0
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

    def push(self, ids: Sequence[int], cache: Cache) -> None:
        """Add `cache`, which holds the tokens of `ids` and maybe some after them."""
        surplus = cache[0].size() - len(ids)
        if not ids or surplus < 0 or (surplus and not all(c.is_trimmable() for c in cache)):
            return
        for c in cache:
            c.trim(surplus)
        self._held.insert(0, (list(ids), cache))
        del self._held[self._size :]
