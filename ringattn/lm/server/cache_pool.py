"""A pool of the caches of earlier requests, for requests with the same beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reuse import Reuse, find_reuse
from ..sharding.forward_pass import restorable, size_of, trim_to

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

    def pop(self, ids: Sequence[int]) -> tuple[Cache | None, Reuse]:
        """Remove and return the cache with the most first tokens of `ids`, at most all but the last.

        A cache that would lose more than half of its tokens stays, for its own conversation.
        """
        found = [(find_reuse(*entry, ids), entry) for entry in self._held]
        usable = [one for one in found if one[0].kept and 2 * one[0].kept >= len(one[1][0])]
        if not usable:
            missed = [reuse for reuse, (tokens, _) in found if 2 * reuse.known >= len(tokens)]
            best = max(missed, key=lambda reuse: reuse.known, default=Reuse(0, 0, len(ids)))
            return None, best._replace(kept=0)
        reuse, entry = max(usable, key=lambda one: one[0].kept)
        self._held.remove(entry)
        trim_to(entry[1], reuse.kept)
        return entry[1], reuse

    def push(self, ids: Sequence[int], cache: Cache) -> None:
        """Add `cache`, which holds the tokens of `ids` and maybe some after them."""
        if not ids or size_of(cache) < len(ids) or restorable(cache, len(ids)) != len(ids):
            return
        trim_to(cache, len(ids))
        self._held.insert(0, (list(ids), cache))
        del self._held[self._size :]

    def shrink(self, tokens: int) -> None:
        """Remove the oldest caches until the others hold at most so many tokens, for which there is memory."""
        while self._held and sum(size_of(cache) for _, cache in self._held) > tokens:
            del self._held[-1]
