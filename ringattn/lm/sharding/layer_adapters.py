"""Attention layers of mlx-lm that do arithmetic on scores themselves: the same layers over a sharded cache.

An adapter gets the layer's own `__call__` and the arguments of a call with a sharded cache. Keys and values are those
that the layer caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import LayerView, sharded_attention, split_heads
from .forward_pass import flat
from .latent import ATTRIBUTES as LATENT
from .latent import LatentView
from .sharded_cache import ShardedKVCache
from .sparse import SparseView, choosing

Adapter = Callable[[Callable, inspect.BoundArguments], mx.array]


def gemma2(plain: Callable, call: inspect.BoundArguments) -> mx.array:
    """Run Gemma 2's attention: scores with a softcap (mlx_lm.models.gemma2.Attention)."""
    given: Any = call.arguments
    layer, x, cache = given["self"], given["x"], given["cache"]
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), offset=cache.offset)
    k = layer.rope(split_heads(layer.k_proj(x), layer.n_kv_heads), offset=cache.offset)
    v = split_heads(layer.v_proj(x), layer.n_kv_heads)
    k, v = cache.update_and_fetch(k, v)
    out = sharded_attention(q, k, v, cache, layer.scale, given.get("mask"), softcap=layer.attn_logit_softcapping)
    return layer.o_proj(_join_heads(out))


def with_view(view: Callable[..., LayerView], plain: Callable, call: inspect.BoundArguments) -> mx.array:
    """Run a layer's own code, with a view in the place of its cache."""
    own = view(call.arguments["cache"], call.arguments.get("mask"))
    call.arguments.update(mask=None, cache=own)
    return plain(*call.args, **call.kwargs)


latent = partial(with_view, LatentView)
sparse = partial(with_view, SparseView)  # of the tokens that an indexer chooses


def wrapper_of(part: nn.Module) -> Callable[[Callable], Callable] | None:
    """Choose a wrapper for the `__call__` of a part of a model; ``None`` where it needs none."""
    if _kind(part) == INDEXER:
        return choosing
    adapter = ADAPTERS.get(_kind(part))
    if all(hasattr(part, name) for name in LATENT):
        indexer = getattr(part, "indexer", None)
        adapter = latent if indexer is None else sparse if _kind(indexer) == INDEXER else None
    return None if adapter is None else partial(adapted, adapter)


def adapted(adapter: Adapter, plain: Callable) -> Callable:
    """The `__call__` of a layer, `plain`, with calls that have a sharded cache passed to `adapter`."""
    signature = inspect.signature(plain)

    def call(*args: Any, **kwargs: Any) -> mx.array:
        bound = signature.bind(*args, **kwargs)
        if any(isinstance(cache, ShardedKVCache) for cache in flat([bound.arguments.get("cache")])):
            return adapter(plain, bound)
        return plain(*args, **kwargs)

    return call


# Layers that are run here by other code than their own are known by module and class, as in mlx_lm_compat.LAYERS:
# another layer with the same attributes may do more with them.
ADAPTERS: dict[tuple[str, str], Adapter] = {("mlx_lm.models.gemma2", "Attention"): gemma2}

INDEXER = ("mlx_lm.models.deepseek_v32", "Indexer")


def _kind(part: nn.Module) -> tuple[str, str]:
    return type(part).__module__, type(part).__name__


def _join_heads(x: mx.array) -> mx.array:
    """The inverse of `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
