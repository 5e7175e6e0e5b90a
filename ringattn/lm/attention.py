"""The attention of mlx-lm's models, over a cache that is spread over a ring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..decode import decode_attention
from ..ring import ring_attention
from .cache import ShardedKVCache, Visible
from .errors import UnsupportedModelError

NAME = "scaled_dot_product_attention"  # what models import from mlx_lm.models.base


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
    """Attention of the tokens that this rank computes to the keys of all ranks. Collective.

    Args:
        q: ``[batch, heads, tokens computed here, head_dim]``.
        k, v: What this rank holds, as `cache` gave it: ``[batch, kv heads, tokens held, _]``.
        cache: The layer's.
        scale, sinks, softcap: As in `ringattn.attention`.
        mask: What the cache's `make_mask` gave, or ``None``.
    """
    if mask is not None and not isinstance(mask, Visible):
        raise UnsupportedModelError(f"mask: {type(mask).__name__} of the model's own, expected what its cache makes")
    options: dict[str, Any] = {
        "kv_layout": cache.layout,
        "ring": cache.ring,
        "scale": scale,
        "mask": "causal",
        "window": cache.window if mask is None else mask.window,
        "sinks": sinks,
        "softcap": softcap,
    }
    assert cache.step is not None
    if cache.step.shared:
        return ring_attention(q, k, v, layout=cache.step.new, **options)  # type: ignore[return-value]
    return decode_attention(q, k, v, start=cache.step.new.start, **options)  # type: ignore[return-value]


def dispatching(plain: Callable) -> Callable:
    """mlx-lm's attention function `plain`, which hands calls with a sharded cache to `sharded_attention`."""

    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
        attend = sharded_attention if isinstance(cache, ShardedKVCache) else plain
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    scaled_dot_product_attention.plain = plain  # type: ignore[attr-defined]
    return scaled_dot_product_attention
