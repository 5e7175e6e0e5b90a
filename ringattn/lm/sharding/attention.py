"""The attention of mlx-lm's models over a cache that is spread over a ring."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from ...core.device import uses_gpu
from ...decode_attention import decode_attention
from ...errors import UnsupportedModelError
from ...ring_attention import ring_attention
from .forward_pass import current
from .sharded_cache import CausalMask, ShardedKVCache, cache_of_keys


def sharded_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cache: ShardedKVCache,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Attend from the tokens that this rank computes to the keys of all ranks. Collective.

    Args:
        q: ``[batch, heads, tokens computed here, head_dim]``.
        k, v: The keys and values that `cache` returned: ``[batch, kv heads, tokens held, _]``.
        cache: The layer's cache.
        scale, sinks, softcap: As in `ringattn.attention`.
        mask: The mask that the cache's `make_mask` returned, or ``None``.

    Returns:
        ``[batch, heads, tokens computed here, value head_dim]``; zeros where nothing reads it.
    """
    if k.shape[2] != cache.held:
        raise UnsupportedModelError(f"attention to {k.shape[2]} keys, expected the {cache.held} that its cache gave it")
    assert cache.step is not None
    constraints = cache.constraints(mask)
    if not q.dtype == k.dtype == v.dtype:  # as in mlx-lm: some layers have wider queries than keys
        dtype = mx.result_type(q, k, v)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    if cache.in_trial() or not current.needs_output():
        return mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    if softcap is None and _mlx_does_it(cache, constraints):
        causal = "causal" if q.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=causal, sinks=sinks)
    options: dict[str, Any] = {
        "kv_layout": cache.layout,
        "ring": cache.ring,
        "scale": scale,
        "mask": "causal",
        **constraints,
        "sinks": sinks,
        "softcap": softcap,
    }
    if cache.step.shared:
        return ring_attention(q, k, v, layout=cache.step.new, **options)
    return decode_attention(q, k, v, start=cache.step.new.start, **options)


def _mlx_does_it(cache: ShardedKVCache, constraints: dict[str, Any]) -> bool:
    """Whether each token attends to all keys up to its own, and all are on this GPU.

    MLX's attention then gives the result, with less work in Python. On a CPU the kernel of ringattn takes less time.
    """
    if cache.ring.size > 1 or not uses_gpu() or constraints.keys() - {"window"}:
        return False
    window = constraints.get("window")
    return window is None or window >= cache.held


def split_heads(x: mx.array, count: int) -> mx.array:
    """``[batch, tokens, count * dim]`` as ``[batch, count, tokens, dim]``."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


class LayerView:
    """Stand-in for the cache of an adapted layer. Its call of mlx-lm's attention comes to `attend`."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: Any) -> mx.array:
        """Attend as mlx-lm's function does. Collective."""
        raise NotImplementedError


def dispatching(plain: Callable) -> Callable:
    """mlx-lm's attention function `plain`, with calls on a sharded cache's keys passed to `sharded_attention`.

    A layer may attend to the keys of another layer's cache. Such keys lead to their cache.
    """

    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
        if isinstance(cache, LayerView):
            return cache.attend(queries, keys, values, scale, mask, sinks)
        own = _cache_of(keys, mask, cache)
        if own is not None:
            keys, values = own.held_instead(keys, values)
            return sharded_attention(queries, keys, values, own, scale, mask, sinks)
        return plain(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return scaled_dot_product_attention


def dispatching_core(core: ModuleType) -> ModuleType:
    """Copy the names of `mlx.core` for a module of mlx-lm that calls the attention of ``mx.fast`` itself.

    In the copy, attention to a sharded cache's keys goes to `sharded_attention`. MLX stays as it is.
    """

    def scaled_dot_product_attention(q, k, v, *, mask=None, scale, sinks=None, **rest):
        own = _cache_of(k, mask)
        if own is not None:
            k, v = own.held_instead(k, v)
            return sharded_attention(q, k, v, own, scale, mask, sinks)
        return core.fast.scaled_dot_product_attention(q, k, v, mask=mask, scale=scale, sinks=sinks, **rest)

    fast = _copied(core.fast, scaled_dot_product_attention=scaled_dot_product_attention)
    return _copied(core, fast=fast)


def _copied(module: ModuleType, **changes: Any) -> ModuleType:
    """A module with the names of `module` and with `changes`."""
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module), **changes)
    return copy


def _cache_of(keys: mx.array, mask: Any, given: Any = None) -> ShardedKVCache | None:
    """The sharded cache that gave `keys` to a layer; ``None`` outside of a sharded model.

    `given` is the cache that the layer names, which counts where the layer has converted its keys.
    """
    own = given if isinstance(given, ShardedKVCache) else None
    if own is None or not own.gave(keys):
        own = cache_of_keys(keys) or own
    if own is None and isinstance(mask, CausalMask):
        raise UnsupportedModelError("attention to keys that no cache of it gave, under the mask of a cache")
    return own
