"""The kinds of caches that the layers of a model need, and the making of such caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ...errors import ArgumentError, UnsupportedModelError
from ...transport.base import Ring
from .. import mlx_lm_compat as compat
from .chunked_cache import Chunk, ShardedChunkedCache
from .forward_pass import ShardedCache, flat
from .history import TokenHistory
from .recurrent_cache import RecurrentCache, Slot, TracingRecurrentCache
from .sharded_cache import ShardedKVCache
from .trial import TracingCache


@dataclass(frozen=True)
class Keys:
    """Keys and values, the tokens of which are spread over the ranks; `window` in tokens, a `Chunk`, or ``None``."""

    window: int | None

    def make(self, ring: Ring, history: TokenHistory) -> ShardedKVCache:
        kind = ShardedChunkedCache if isinstance(self.window, Chunk) else ShardedKVCache
        return kind(ring, self.window, history)

    def make_tracing(self) -> TracingCache:
        return TracingCache(self.window)

    def traced(self, cache: TracingCache) -> Keys:
        return self


@dataclass(frozen=True)
class State:
    """The arrays of a recurrent layer; `slots` is known after a trial pass."""

    count: int
    slots: tuple[Slot, ...] = ()

    def make(self, ring: Ring, history: TokenHistory) -> RecurrentCache:
        return RecurrentCache(ring, self.slots, history)

    def make_tracing(self) -> TracingRecurrentCache:
        return TracingRecurrentCache(self.count)

    def traced(self, cache: TracingRecurrentCache) -> State:
        return State(self.count, cache.found_slots())


@dataclass(frozen=True)
class Several:
    """Several caches of one layer."""

    members: tuple[Kind, ...]

    def make(self, ring: Ring, history: TokenHistory) -> Any:
        return compat.CacheList(*(member.make(ring, history) for member in self.members))

    def make_tracing(self) -> Any:
        return compat.CacheList(*(member.make_tracing() for member in self.members))

    def traced(self, cache: Any) -> Several:
        return Several(tuple(member.traced(one) for member, one in zip(self.members, cache.caches)))


Kind = Keys | State | Several


def cache_kinds(model: nn.Module) -> list[Kind]:
    """The kind of cache of each layer, by the cache that the model itself makes for it.

    Raises:
        UnsupportedModelError: A layer has a cache of another kind.
    """
    kinds = []
    for i, cache in enumerate(compat.make_prompt_cache(model)):
        try:
            kinds.append(_kind(cache))
        except ArgumentError as error:
            raise UnsupportedModelError(
                f"model: {compat.model_name(model)} has a {error} at layer {i}, expected KVCache, RotatingKVCache or "
                "ArraysCache: its state cannot be spread over a ring"
            ) from None
    return kinds


def traced_kinds(model: nn.Module, kinds: Sequence[Kind], caches: Sequence[Any]) -> list[Kind]:
    """The kinds with what the layers have kept in `caches` in a trial pass."""
    found: list[Kind] = []
    for i, (kind, cache) in enumerate(zip(kinds, caches)):
        try:
            found.append(kind.traced(cache))
        except ArgumentError as error:
            name = compat.model_name(model)
            raise UnsupportedModelError(f"model: {name} has a layer of another kind at {i}: {error}") from None
    return found


def check_caches(name: str, found: Sequence[Any], expected: Sequence[Any]) -> list[ShardedCache]:
    """Return the caches of `found`; `expected` are those that the model makes.

    Raises:
        ArgumentError: `found`, the argument `name`, is of another model, or its layers hold different tokens.
    """
    leaves, wanted = flat(found), flat(expected)
    kinds = [_counted([type(leaf).__name__ for leaf in side]) for side in (leaves, wanted)]
    if [type(leaf) for leaf in leaves] != [type(leaf) for leaf in wanted]:
        raise ArgumentError(f"{name}: {kinds[0]}, expected what the model's make_cache or load_cache gives: {kinds[1]}")
    for i, (leaf, one) in enumerate(zip(leaves, wanted)):
        if leaf.form != one.form:
            raise ArgumentError(f"{name}: cache {i} with {leaf.form}, expected {one.form} for this model")
    sizes = sorted({leaf.size() for leaf in leaves})
    if len(sizes) > 1:
        raise ArgumentError(f"{name}: {sizes[0]} tokens in one layer and {sizes[-1]} in another, expected equal counts")
    return leaves


def _counted(names: Sequence[str]) -> str:
    """The names with the number of each."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items()) or "nothing"


def _kind(cache: Any) -> Kind:
    """The kind of one of mlx-lm's caches; ArgumentError with its name where it is another."""
    if type(cache) is compat.KVCache:
        return Keys(None)
    if type(cache) is compat.RotatingKVCache and cache.keep == 0:
        return Keys(cache.max_size)
    if type(cache) is compat.ChunkedKVCache:
        return Keys(Chunk(cache.chunk_size))
    if type(cache) is compat.ArraysCache:
        return State(len(cache.cache))
    if type(cache) is compat.CacheList:
        return Several(tuple(map(_kind, cache.caches)))
    raise ArgumentError(type(cache).__name__)
