"""Attention layers of mlx-lm that do their own arithmetic on scores: the same layers, over a sharded cache.

Each function is the layer's `__call__` with a sharded cache. Keys and values are those that the layer caches.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .attention import sharded_attention


def gemma2(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Gemma 2: scores with a softcap (mlx_lm.models.gemma2.Attention)."""
    q, k, v = (
        _heads(project(x), count)
        for project, count in (
            (layer.q_proj, layer.n_heads),
            (layer.k_proj, layer.n_kv_heads),
            (layer.v_proj, layer.n_kv_heads),
        )
    )
    q, k = layer.rope(q, offset=cache.offset), layer.rope(k, offset=cache.offset)
    k, v = cache.update_and_fetch(k, v)
    out = sharded_attention(q, k, v, cache, layer.scale, mask, softcap=layer.attn_logit_softcapping)
    return layer.o_proj(_joined(out))


def latent(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """DeepSeek's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the up-projections absorbed.

    The latent vector of a token with its rope part is the one key of all heads, and the latent vector alone its value:
    ``q . k = (W_k^T q_nope) . c + q_rope . k_rope``, and ``out = W_v (sum_j p_j c_j)``. So c and k_rope are all that is
    cached and all that travels.
    """
    q = layer.q_proj(x) if layer.q_lora_rank is None else layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q_nope, q_rope = mx.split(_heads(q, layer.num_heads), [layer.qk_nope_head_dim], axis=-1)
    c, k_rope = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
    c, k_rope = layer.kv_a_layernorm(c)[:, None], layer.rope(_heads(k_rope, 1), cache.offset)
    q_rope = layer.rope(q_rope, cache.offset)
    c, k_rope = cache.update_and_fetch(c, k_rope)
    q = mx.concatenate([layer.embed_q(q_nope), q_rope], -1)
    out = sharded_attention(q, mx.concatenate([c, k_rope], -1), c, cache, layer.scale, mask)
    return layer.o_proj(_joined(layer.unembed_out(out)))


ADAPTERS = {  # by module and class
    ("mlx_lm.models.gemma2", "Attention"): gemma2,
    ("mlx_lm.models.deepseek_v3", "DeepseekV3Attention"): latent,
}


def _heads(x: mx.array, count: int) -> mx.array:
    """``[batch, tokens, count * dim]`` as ``[batch, count, tokens, dim]``."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def _joined(x: mx.array) -> mx.array:
    """The inverse of `_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
