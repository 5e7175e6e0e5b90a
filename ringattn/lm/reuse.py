"""Reuse of a cache for a new prompt: which of its first tokens need not be read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .sharding.forward_pass import flat, restorable
from .sharding.history import shared_length


class Reuse(NamedTuple):
    """Tokens of a prompt that a cache saves reading.

    Attributes:
        kept: The number of first tokens that stay in the cache.
        known: The number of first tokens that the cache has read, at most all but the last; not less than `kept`.
        tokens: The number of tokens of the prompt.
        loss: Why fewer are kept than known.
    """

    kept: int
    known: int
    tokens: int
    loss: str = ""

    @property
    def line(self) -> str | None:
        """One line for a log; ``None`` where no token is read a second time."""
        if self.kept == self.known:
            return None
        return (
            f"Prompt of {self.tokens:,} tokens: {self.kept:,} are reused and {self.tokens - self.kept:,} read, "
            f"{self.known - self.kept:,} of these again: {self.loss}."
        )


def find_reuse(held: Sequence[int], caches: Sequence[Any], ids: Sequence[int]) -> Reuse:
    """Compare a prompt with a cache, which has read the tokens `held`; the last token of `ids` is always read."""
    known = max(0, min(shared_length(held, ids), len(ids) - 1))
    leaves = flat(caches)
    loss = next((leaf.loss for leaf in leaves if leaf.restorable(known) < known), "")
    return Reuse(restorable(leaves, known), known, len(ids), loss)
