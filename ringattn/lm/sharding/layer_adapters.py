"""Attention layers of mlx-lm that do arithmetic on scores themselves: the same layers over a sharded cache.

Each function is the layer's `__call__` with a sharded cache. Keys and values are those that the layer caches.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .attention import sharded_attention


def gemma2(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Run Gemma 2's attention: scores with a softcap (mlx_lm.models.gemma2.Attention)."""
    q = layer.rope(_split_heads(layer.q_proj(x), layer.n_heads), offset=cache.offset)
    k = layer.rope(_split_heads(layer.k_proj(x), layer.n_kv_heads), offset=cache.offset)
    v = _split_heads(layer.v_proj(x), layer.n_kv_heads)
    k, v = cache.update_and_fetch(k, v)
    out = sharded_attention(q, k, v, cache, layer.scale, mask, softcap=layer.attn_logit_softcapping)
    return layer.o_proj(_join_heads(out))


def latent(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Run DeepSeek's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the up-projections absorbed.

    The latent vector of a token with its rope part is the one key of all heads, and the latent vector alone its value:
    ``q . k = (W_k^T q_nope) . c + q_rope . k_rope``, and ``out = W_v (sum_j p_j c_j)``. Only c and k_rope are cached,
    and only they travel.
    """
    q = layer.q_proj(x) if layer.q_lora_rank is None else layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q_nope, q_rope = mx.split(_split_heads(q, layer.num_heads), [layer.qk_nope_head_dim], axis=-1)
    c, k_rope = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
    c = layer.kv_a_layernorm(c)[:, None]
    k_rope = layer.rope(_split_heads(k_rope, 1), cache.offset)
    q_rope = layer.rope(q_rope, cache.offset)
    c, k_rope = cache.update_and_fetch(c, k_rope)
    q = mx.concatenate([layer.embed_q(q_nope), q_rope], -1)
    out = sharded_attention(q, mx.concatenate([c, k_rope], -1), c, cache, layer.scale, mask)
    return layer.o_proj(_join_heads(layer.unembed_out(out)))


ADAPTERS = {  # by module and class, as in mlx_lm_compat.LAYERS
    ("mlx_lm.models.gemma2", "Attention"): gemma2,
    ("mlx_lm.models.deepseek_v3", "DeepseekV3Attention"): latent,
}


def _split_heads(x: mx.array, count: int) -> mx.array:
    """``[batch, tokens, count * dim]`` as ``[batch, count, tokens, dim]``."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def _join_heads(x: mx.array) -> mx.array:
    """The inverse of `_split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
