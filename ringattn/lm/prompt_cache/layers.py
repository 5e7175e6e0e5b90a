"""Descriptions of a saved cache's layers: the arrays of each one, and the tokens that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...layout import Layout
from ..sharding.recurrent_cache import RecurrentCache
from ..sharding.sharded_cache import ShardedKVCache

NAMES = ("keys", "values")  # the names of the arrays of keys and values
Expected = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of each array


@dataclass(frozen=True)
class SavedKeys:
    """Keys and values of one cache; each rank's file has its part.

    Attributes:
        form: The `form` of the cache.
        layout: The tokens in each rank's file.
        keys, values: The shapes, ``(batch, kv heads, head_dim)``.
        dtype: The dtype of both.
    """

    form: str
    layout: Layout
    keys: tuple[int, int, int]
    values: tuple[int, int, int]
    dtype: str

    @classmethod
    def of(cls, cache: ShardedKVCache) -> SavedKeys:
        """Describe a cache."""
        keys, values = cache.state
        (b, heads, _, dim), (_, v_heads, _, v_dim) = keys.shape, values.shape
        return cls(cache.form, cache.layout, (b, heads, dim), (b, v_heads, v_dim), str(keys.dtype))

    def expected(self, file: int) -> Expected:
        """Shape and dtype of each array in a file."""
        tokens = self.layout.local_length(file)
        shapes = zip(NAMES, (self.keys, self.values))
        return {name: ((b, heads, tokens, dim), self.dtype) for name, (b, heads, dim) in shapes}


@dataclass(frozen=True)
class SavedStates:
    """The state of a recurrent layer, and the earlier ones that are kept; each rank's file has all of them.

    Attributes:
        form: The `form` of the cache.
        sizes: The numbers of tokens before the states, in ascending order.
        arrays: The shape and dtype of each array of each state. A short prompt may leave a narrower dtype.
    """

    form: str
    sizes: tuple[int, ...]
    arrays: tuple[tuple[tuple[tuple[int, ...], str], ...], ...]

    @classmethod
    def of(cls, cache: RecurrentCache) -> SavedStates:
        """Describe a cache."""
        states = cache.states
        arrays = tuple(tuple((tuple(x.shape), str(x.dtype)) for x in held if x is not None) for held in states.values())
        return cls(cache.form, tuple(states), arrays)

    def expected(self, file: int) -> Expected:
        """Shape and dtype of each array in a file."""
        states = zip(self.sizes, self.arrays)
        return {state_name(size, i): found for size, arrays in states for i, found in enumerate(arrays)}

    def states(self, arrays: Mapping[str, mx.array]) -> dict[int, list[mx.array | None]]:
        """The states in the arrays of a file."""
        counts = zip(self.sizes, map(len, self.arrays))
        return {size: [arrays[state_name(size, i)] for i in range(count)] for size, count in counts}


SavedLayer = SavedKeys | SavedStates


def state_name(size: int, i: int) -> str:
    """The name of array `i` of the state after `size` tokens."""
    return f"state {size}.{i}"


def describe(cache: Any) -> SavedLayer:
    """Describe a cache."""
    return SavedStates.of(cache) if isinstance(cache, RecurrentCache) else SavedKeys.of(cache)


def arrays_of(cache: Any) -> dict[str, mx.array]:
    """Name this rank's arrays of a cache as in its file."""
    if not isinstance(cache, RecurrentCache):
        return dict(zip(NAMES, cache.state))
    states = cache.states.items()
    return {state_name(size, i): x for size, arrays in states for i, x in enumerate(arrays) if x is not None}
