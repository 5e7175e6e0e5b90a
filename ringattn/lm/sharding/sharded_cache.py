"""A key/value cache whose tokens are spread over a ring, with the interface of mlx-lm's caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...core.intervals import length, locate, positions
from ...errors import ArgumentError, UnsupportedModelError
from ...layout import Layout
from ...transport.base import Ring
from .forward_pass import ShardedCache, current, flat
from .history import TokenHistory
from .partition import Step, extended, within

GROWTH = 256  # tokens by which the arrays grow during decoding
SLACK = 256  # tokens beyond its window that a layer keeps, so that not each new token moves all others


class CausalMask(str):
    """The mask that `make_mask` returns: causal by the tokens' positions, and the window where a layer has one."""

    window: int | None

    def __new__(cls, window: int | None) -> CausalMask:
        mask = super().__new__(cls, "causal")
        mask.window = window
        return mask


def cache_of_keys(keys: mx.array) -> ShardedKVCache | None:
    """The cache that returned `keys` to a layer in this forward pass."""
    caches = (cache for cache in current.caches if isinstance(cache, ShardedKVCache))
    return next((cache for cache in caches if cache.gave(keys)), None)


class ShardedKVCache(ShardedCache):
    """Cache of one layer with this rank's keys and values. mlx-lm calls it as it calls its own `KVCache`.

    Args:
        ring: The ring, of `ringattn.init`.
        window: The layer's window in tokens; older tokens are dropped. ``None``: no window.
        history: The ids of the tokens, one object for all layers of a model.

    Attributes:
        layout: The tokens of the context that each rank holds.
        offset: The position of the next token that this rank computes (mlx-lm's rope asks for it).
        window: The layer's window in tokens, or ``None``.
        keys, values: ``[batch, kv heads, room, head_dim]``; the first ``layout.local_length(ring.rank)`` are in use.
    """

    loss = "a window has dropped tokens before them"

    def __init__(self, ring: Ring, window: int | None = None, history: TokenHistory | None = None):
        super().__init__(ring, history)
        self.window = window
        self.fetched_keys: mx.array | None = None  # the keys that the layer got in this forward pass
        self._counted: mx.array | None = None  # the keys that another layer got in this forward pass
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def end(self) -> None:
        """Clear the state of the forward pass."""
        super().end()
        self.fetched_keys = None
        self._counted = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep this rank's part of new keys and values; return all that it holds ``[batch, kv heads, tokens, _]``."""
        if self.step is None or (keys.shape[2] != self._computed(self.step)):
            raise ArgumentError("cache: used by a model that is not sharded, expected one of ringattn.lm.shard")
        step = self.step
        before = self.held
        if not step.shared and not step.new.spans[self.ring.rank]:
            keys, values = keys[:, :, :0], values[:, :, :0]
        first = self._first_wanted(step)
        if first > self.layout.start:
            before = self._drop(first)
        self.keys = _append(self.keys, keys, before, step.shared)
        self.values = _append(self.values, values, before, step.shared)
        self.layout = extended(self.layout, step.new)
        self.offset = step.new.stop
        self.fetched_keys, values = self._all_held()
        return self.fetched_keys, values

    @property
    def unwritten(self) -> int:
        """1 until the layer has put its keys and values into the cache."""
        return int(self.fetched_keys is None)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values that this rank holds.

        In a forward pass other layers ask for them, and may count them to find the position of their queries. They get
        zeros, as many as one process holds after this rank's tokens; `held_instead` exchanges them.
        """
        held = self._all_held()
        if self.fetched_keys is None or self.step is None:
            return held
        count = self.own_start(self.step) + self._computed(self.step)
        keys, values = (mx.broadcast_to(mx.zeros(1, x.dtype), (*x.shape[:2], count, x.shape[3])) for x in held)
        self._counted = keys
        return keys, values

    def gave(self, keys: mx.array) -> bool:
        """Whether a layer got `keys` from this cache in this forward pass."""
        return keys is self.fetched_keys or keys is self._counted

    def held_instead(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values that this rank holds in the place of zeros that `keys_and_values` gave."""
        return self._all_held() if keys is self._counted else (keys, values)

    def in_trial(self) -> bool:
        """Whether attention computes nothing, since the pass is a trial."""
        return False

    def _all_held(self) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            raise ArgumentError("cache: empty, expected at least one token in it")
        held = self.held
        return self.keys[:, :, :held], self.values[:, :, :held]

    @property
    def held(self) -> int:
        """The number of tokens that this rank holds."""
        return self.layout.local_length(self.ring.rank)

    def constraints(self, mask: Any) -> dict[str, Any]:
        """The options of attention, beside a causal mask, for this step's tokens under `mask`.

        For a single token mlx-lm's cache keeps no more than its window, even where the mask allows more.
        """
        if mask is not None and not isinstance(mask, CausalMask):
            raise UnsupportedModelError(
                f"mask: {type(mask).__name__} of the model's own, expected what its cache makes"
            )
        return {"window": self._window_under(mask)}

    def _window_under(self, mask: CausalMask | None) -> int | None:
        if mask is None or mask.window is None or self.window is None:
            return self.window if mask is None else mask.window
        assert self.step is not None
        return min(mask.window, self.window) if self.step.new.length == 1 else mask.window

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> CausalMask:
        """A causal mask; `return_array` makes no difference, since no rank has all columns."""
        return CausalMask(window_size or self.window)

    def empty(self) -> bool:
        """Whether no token was ever cached on this rank."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank, with the room for more tokens; see `held_bytes`."""
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens that this rank holds."""
        return _bytes_of_tokens(self, self.held)

    @property
    def form(self) -> str:
        """The window."""
        return f"keys and values, window {self.window}"

    @property
    def state(self) -> Sequence[Any]:
        """Keys and values of this rank, as mlx-lm's caches return them; nothing while it is empty."""
        return [] if self.keys is None else list(self.keys_and_values())

    def is_trimmable(self) -> bool:
        """Whether tokens can be removed at the end: not once a window has dropped some."""
        return self.layout.start == 0

    def restorable(self, size: int) -> int:
        """The largest number of first tokens, at most `size`, that `trim` can leave in the cache."""
        return min(size, self.size()) if size >= self.size() or self.is_trimmable() else 0

    def trim(self, n: int) -> int:
        """Remove the last `n` tokens; return how many were removed. Every rank calls it."""
        n = min(n, self.layout.stop)
        if n:
            left = self.layout.stop - n
            self.layout = within(self.layout, min(self.layout.start, left), left)
            self.offset = self.layout.stop
        return n

    def restore(self, layout: Layout, keys: mx.array, values: mx.array, history: TokenHistory) -> None:
        """Hold the tokens of `layout`; `keys` and `values` are this rank's part."""
        self.layout = layout
        self.offset = layout.stop
        self.keys = keys
        self.values = values
        self.history = history

    def _computed(self, step: Step) -> int:
        """The number of tokens that this rank computes in a step."""
        return step.new.local_length(self.ring.rank) if step.shared else step.new.length

    def _first_wanted(self, step: Step) -> int:
        """The first position inside the window of the new tokens, rounded down so that it seldom changes."""
        if self.window is None:
            return 0
        first = max(0, step.new.start - self.window + 1)
        return first if step.shared else first // SLACK * SLACK

    def _drop(self, first: int) -> int:
        """Drop the tokens before `first`; return how many are left on this rank."""
        rank = self.ring.rank
        held = self.layout.spans[rank]
        self.layout = within(self.layout, first, self.layout.stop)
        dropped = length(held) - self.layout.local_length(rank)
        if dropped and self.keys is not None and self.values is not None:
            self.keys = mx.contiguous(self.keys[:, :, dropped:])
            self.values = mx.contiguous(self.values[:, :, dropped:])
        return self.layout.local_length(rank)


def held_bytes(caches: Sequence[Any]) -> int:
    """Bytes of the context that the caches of a model, sharded or mlx-lm's own, hold on this rank.

    Room for more tokens counts in ``nbytes``, but not here: caches grow in steps.
    """
    return sum(_held_bytes(cache) for cache in flat(caches))


def contents(caches: Sequence[Any]) -> str:
    """The kinds of arrays that caches, sharded or mlx-lm's own, hold: for people."""
    found = {"keys and values" if hasattr(cache, "keys") else "states" for cache in flat(caches)}
    return "keys, values and states" if len(found) == 2 else found.pop()


def held_tokens(caches: Sequence[Any], rank: int) -> int:
    """The most tokens whose keys and values a cache of a layer, sharded or mlx-lm's own, holds on a rank."""
    return max(
        cache.layout.local_length(rank) if isinstance(cache, ShardedCache) else int(getattr(cache, "offset", 0))
        for cache in flat(caches)
    )


def _held_bytes(cache: Any) -> int:
    if isinstance(cache, ShardedCache):
        return cache.held_bytes
    return _bytes_of_tokens(cache, cache.size()) if hasattr(cache, "keys") else int(cache.nbytes)


def _bytes_of_tokens(cache: Any, tokens: int) -> int:
    return sum(x.nbytes // max(1, x.shape[2]) * tokens for x in (cache.keys, cache.values) if x is not None)


def _append(held: mx.array | None, new: mx.array, before: int, exact: bool) -> mx.array:
    """The first `before` tokens of `held` followed by `new`, with room for more unless `exact`."""
    after = before + new.shape[2]
    if held is None:
        held = mx.zeros((*new.shape[:2], 0, new.shape[3]), new.dtype)
    if exact:
        return mx.concatenate([held[:, :, :before], new], 2)
    if after > held.shape[2]:
        room = mx.zeros((*new.shape[:2], -(-after // GROWTH) * GROWTH - before, new.shape[3]), new.dtype)
        held = mx.concatenate([held[:, :, :before], room], 2)
    if new.shape[2]:
        held[:, :, before:after] = new
    return held


def pick(x: mx.array, have: tuple, want: tuple) -> mx.array:
    """The tokens at the positions `want` of `x`, whose third axis holds the positions `have`."""
    return x[:, :, mx.array(positions(locate(want, have)))]
