"""The memory that a rank needs for a context. `ringattn plan` promises by this model, and generation admits by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import mlx_lm_compat as compat
from .sharding.cache_kinds import Kind, Several, State
from .sharding.forward_pass import flat
from .sharding.partition import RUN
from .sharding.recurrent_cache import KEPT
from .sharding.sharded_cache import GROWTH, SLACK, ShardedKVCache

PROCESS = 256 << 20  # bytes of Python, MLX and mlx-lm; on Linux about 130 MiB were measured, with a small tokenizer
BLOCKS = 3  # of a layer's keys beside the cache: two that travel, and the copy to which new tokens are appended
MOST = 1 << 31  # tokens; a longer context counts as no limit


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one layer.

    Attributes:
        token_bytes: Bytes of one token on a rank that holds it.
        window: Tokens that the layer keeps; ``None``: all.
        heads: Key/value heads on this rank.
    """

    token_bytes: int
    window: int | None = None
    heads: int = 1


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank.

    Attributes:
        weights: Bytes of the weights on this rank.
        layers: The layers that hold keys and values.
        states: Bytes of all states of recurrent layers, with the earlier ones that they keep.
        activations: Bytes that one token of a round of prefill needs beside the cache.
    """

    weights: int
    layers: tuple[CacheLayer, ...]
    states: int = 0
    activations: int = 0

    def cache(self, tokens: int, share: float = 1.0, chunk: int = 0) -> int:
        """Bytes of keys, values and states.

        Args:
            tokens: Tokens of context on all ranks.
            share: The part of the tokens that this rank holds, above 0 and at most 1.
            chunk: Tokens that this rank computes in a round of prefill.
        """
        return self.states + sum(_held(layer, tokens, share, chunk) * layer.token_bytes for layer in self.layers)

    def needed(self, tokens: int, share: float = 1.0, chunk: int = 0) -> int:
        """Bytes of everything on this rank while it reads a context; the arguments are those of `cache`."""
        blocks = (_held(layer, tokens, share, chunk) * layer.token_bytes for layer in self.layers)
        working = self.activations * min(chunk, max(tokens, 1)) + BLOCKS * max(blocks, default=0)
        return PROCESS + self.weights + self.cache(tokens, share, chunk) + working

    def longest(self, available: int, share: float = 1.0, chunk: int = 0) -> int:
        """The most tokens of context for which `available` bytes are enough: 0 for none, `MOST` for no limit."""
        low, high = 0, MOST
        if self.needed(0, share, chunk) > available:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.needed(middle, share, chunk) <= available:
                low = middle
            else:
                high = middle - 1
        return low


def _held(layer: CacheLayer, tokens: int, share: float, chunk: int) -> int:
    """Tokens for which a layer has room on a rank."""
    if layer.window is not None:
        tokens = min(tokens, layer.window + SLACK + int(chunk / share))
    held = tokens if share >= 1 else min(tokens, int(tokens * share) + RUN)
    return held + GROWTH if tokens else 0


def footprint_of(model: nn.Module, kinds: Sequence[Kind], caches: Sequence[Any]) -> Footprint:
    """The footprint of a model on this rank, whose layers have left their keys in `caches` in a trial pass."""
    leaves = [cache for cache in flat(caches) if isinstance(cache, ShardedKVCache)]
    layers = tuple(
        CacheLayer(_token_bytes(cache), cache.window, cache.keys.shape[1]) for cache in leaves if cache.keys is not None
    )
    weights: Any = tree_flatten(model.parameters())
    kept = KEPT + 2  # with the state itself, and the one before the last pass
    states = kept * sum(map(_state_bytes, kinds))
    return Footprint(sum(x.nbytes for _, x in weights), layers, states, _activations(model))


def _token_bytes(cache: ShardedKVCache) -> int:
    """Bytes of the keys and values of one token."""
    arrays = [x for x in (cache.keys, cache.values) if x is not None]
    return sum(x.shape[1] * x.shape[3] * x.dtype.size for x in arrays)


def _state_bytes(kind: Kind) -> int:
    """Bytes of the state of a recurrent layer; 0 for another layer."""
    if isinstance(kind, Several):
        return sum(map(_state_bytes, kind.members))
    if not isinstance(kind, State):
        return 0
    return sum(_size(slot.shape) * slot.dtype.size for slot in kind.slots)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _activations(model: nn.Module) -> int:
    """Bytes of the outputs of all linear parts of the widest layer for one token, in float32."""
    layers = [layer for layer in model.layers if layer is not None]
    return 4 * max((sum(map(_width, layer.modules())) for layer in layers), default=0)


def _width(part: Any) -> int:
    """Numbers that a linear part computes for one token."""
    weight = part.get("weight") if isinstance(part, dict) else None
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    experts = weight.shape[0] if compat.is_mixture(part) else 1
    return int(weight.shape[-2] * min(experts, 8))
