"""Layers with several caches of their own, such as two attentions in one layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .sharded_cache import ShardedKVCache


class ShardedCacheList:
    """The caches of one layer. mlx-lm calls it as it calls its own `CacheList`."""

    def __init__(self, *caches: ShardedKVCache):
        self.caches = caches

    def __getitem__(self, index: int) -> ShardedKVCache:
        return self.caches[index]

    def __len__(self) -> int:
        return len(self.caches)

    def size(self) -> int:
        """The number of tokens in the context, on all ranks together."""
        return self.caches[0].size()

    @property
    def tokens(self) -> np.ndarray:
        """The ids of the context's tokens: ``[batch, tokens]``, int32."""
        return self.caches[0].tokens

    def empty(self) -> bool:
        """Whether no token was ever cached on this rank."""
        return self.caches[0].empty()

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank, with the room for more tokens."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def state(self) -> Sequence[Any]:
        """The states of the caches."""
        return [cache.state for cache in self.caches]

    def is_trimmable(self) -> bool:
        """Whether tokens can be removed at the end."""
        return all(cache.is_trimmable() for cache in self.caches)

    def trim(self, n: int) -> int:
        """Remove the last `n` tokens; return how many were removed. Every rank calls it."""
        return max(cache.trim(n) for cache in self.caches)


LayerCache = ShardedKVCache | ShardedCacheList


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches of a model one by one, with those inside lists of caches."""
    for cache in caches:
        yield from getattr(cache, "caches", (cache,))
