"""A key/value cache whose tokens are spread over a ring, behind the interface of mlx-lm's caches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ...core.intervals import length, locate, positions
from ...errors import ArgumentError
from ...layout import Layout
from ...transport.base import Ring
from ...transport.solo import SoloRing
from .history import TokenHistory
from .partition import Step, extended, within

GROWTH = 256  # tokens that are made room for while they come one by one
SLACK = 256  # tokens beyond its window that a layer keeps, lest each token move all others


class Visible(str):
    """What `make_mask` gives: a causal mask by the tokens' positions, with the window of the layers that ask for it."""

    window: int | None

    def __new__(cls, window: int | None) -> Visible:
        mask = super().__new__(cls, "causal")
        mask.window = window
        return mask


_under_way = threading.local()  # the caches of the model call that this thread is in


@contextmanager
def step_through(caches: Sequence[ShardedKVCache], step: Step) -> Iterator[None]:
    """The tokens of `step` go through the layers whose caches these are."""
    for cache in caches:
        cache.begin(step)
    before, _under_way.caches = getattr(_under_way, "caches", ()), caches
    try:
        yield
    finally:
        _under_way.caches = before
        for cache in caches:
            cache.end()


def giver(keys: mx.array) -> ShardedKVCache | None:
    """The cache that gave `keys` to a layer in the model call that is under way."""
    return next((cache for cache in getattr(_under_way, "caches", ()) if cache.given is keys), None)


class ShardedKVCache:
    """This rank's keys and values of one layer. mlx-lm calls it as it calls its own `KVCache`.

    A model that went through `ringattn.lm.shard` says what comes next (`begin`) before its layers run.

    Args:
        ring: The ring, of `ringattn.init`.
        window: What the layer's window is, in tokens; older ones are dropped. ``None``: none.
        history: The ids of the tokens, one for all layers of a model.

    Attributes:
        layout: Which tokens of the context each rank holds.
        offset: The position of the next token that this rank computes (mlx-lm's rope asks for it).
        keys, values: ``[batch, kv heads, room, head_dim]``; the first ``layout.local_length(ring.rank)`` are in use.
    """

    def __init__(self, ring: Ring, window: int | None = None, history: TokenHistory | None = None):
        self.ring, self.window = ring, window
        self.history = history or TokenHistory()
        self.layout = Layout(((),) * ring.size, 0)
        self.offset = 0
        self.step: Step | None = None
        self.given: mx.array | None = None  # the keys that the layer has been given in this step
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def begin(self, step: Step) -> None:
        """The tokens of `step` come next."""
        self.step = step
        own = step.new.spans[self.ring.rank]
        self.offset = own[0][0] if step.shared else step.new.start

    def end(self) -> None:
        """They have been through all layers."""
        self.offset, self.given = self.layout.stop, None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep what this rank is to keep of new keys and values; all that it holds ``[batch, kv heads, tokens, _]``."""
        if self.step is None or (keys.shape[2] != self._computed(self.step)):
            raise ArgumentError("cache: used by a model that is not sharded, expected one of ringattn.lm.shard")
        step, before = self.step, self.layout.local_length(self.ring.rank)
        if not step.shared and not step.new.spans[self.ring.rank]:
            keys, values = keys[:, :, :0], values[:, :, :0]
        first = self._first_wanted(step)
        if first > self.layout.start:
            before = self._drop(first)
        self.keys, self.values = (
            _append(x, new, before, step.shared) for x, new in ((self.keys, keys), (self.values, values))
        )
        self.layout = extended(self.layout, step.new)
        self.offset = step.new.stop
        self.given, values = self.keys_and_values()
        return self.given, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that this rank holds."""
        if self.keys is None or self.values is None:
            raise ArgumentError("cache: empty, expected at least one token in it")
        return self.keys[:, :, : self.held], self.values[:, :, : self.held]

    @property
    def held(self) -> int:
        """The tokens that this rank holds."""
        return self.layout.local_length(self.ring.rank)

    def reach(self, mask: Visible | None) -> int | None:
        """The window of this step's tokens under `mask`.

        mlx-lm's cache keeps no more than its window when one token comes, whatever the mask would let it see.
        """
        if mask is None or mask.window is None or self.window is None:
            return self.window if mask is None else mask.window
        assert self.step is not None
        return min(mask.window, self.window) if self.step.new.length == 1 else mask.window

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Visible:
        """A causal mask; `return_array` makes no difference: no rank has all columns."""
        return Visible(window_size or self.window)

    def size(self) -> int:
        """The tokens of the context, on all ranks."""
        return self.layout.stop

    @property
    def tokens(self) -> np.ndarray:
        """The ids of the context's tokens, also of those that a window has dropped: ``[batch, tokens]``, int32."""
        return self.history.read(self.size())

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank, the room for more tokens included; see `held_bytes`."""
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)

    @property
    def state(self) -> Sequence[Any]:
        """This rank's arrays."""
        return [] if self.keys is None else list(self.keys_and_values())

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: not once a window has dropped some."""
        return self.layout.start == 0

    def trim(self, n: int) -> int:
        """Take the last `n` tokens back; how many that were. Every rank calls it."""
        n = min(n, self.layout.stop)
        if n:
            self.layout = within(self.layout, 0, self.layout.stop - n)
            self.offset = self.layout.stop
        return n

    def restore(self, layout: Layout, keys: mx.array, values: mx.array, history: TokenHistory) -> None:
        """Hold the tokens of `layout`, of which `keys` and `values` are this rank's."""
        self.layout, self.offset, self.keys, self.values = layout, layout.stop, keys, values
        self.history = history

    def _computed(self, step: Step) -> int:
        return step.new.local_length(self.ring.rank) if step.shared else step.new.length

    def _first_wanted(self, step: Step) -> int:
        """The first position that the window of the new tokens reaches, rounded down so that it seldom moves."""
        if self.window is None:
            return 0
        first = max(0, step.new.start - self.window + 1)
        return first if step.shared else first // SLACK * SLACK

    def _drop(self, first: int) -> int:
        """Forget the tokens before `first`; how many are left here."""
        rank = self.ring.rank
        held, self.layout = self.layout.spans[rank], within(self.layout, first, self.layout.stop)
        dropped = length(held) - self.layout.local_length(rank)
        if dropped and self.keys is not None and self.values is not None:
            self.keys, self.values = (mx.contiguous(x[:, :, dropped:]) for x in (self.keys, self.values))
        return self.layout.local_length(rank)


class Probe(ShardedKVCache):
    """A cache for a look at what the layers of a model do with theirs: attention over it computes nothing."""

    def __init__(self, window: int | None = None):
        super().__init__(SoloRing(60.0), window)


def held_bytes(caches: Sequence[Any]) -> int:
    """Bytes of the tokens that a prompt cache holds on this rank, of mlx-lm's `KVCache` or ours.

    Room for more tokens does not count, as it does in ``nbytes``: caches grow in steps.
    """
    return sum(_held_bytes(cache) for cache in caches)


def _held_bytes(cache: Any) -> int:
    tokens = cache.held if isinstance(cache, ShardedKVCache) else cache.size()
    return sum(x.nbytes // max(1, x.shape[2]) * tokens for x in (cache.keys, cache.values) if x is not None)


def _append(held: mx.array | None, new: mx.array, before: int, exact: bool) -> mx.array:
    """`new` behind the first `before` tokens of `held`; with room for more unless `exact`."""
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
    """The tokens at the positions `want` of `x`, which holds those at `have`, on its third axis."""
    return x[:, :, mx.array(positions(locate(want, have)))]
