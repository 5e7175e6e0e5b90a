"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a sharded cache, for any layer of the kind.

The latent vector c of a token with its rope part r is the one key of all heads, and c alone its value. Only c and r are
cached, and only they travel. A layer's score of a query and a token is linear in (c, r), and so is a token's value in
c. The layer runs its own code, and gets the unit vectors in the place of the tokens that the ranks hold:

- its scores with the unit vectors are the query in the space of (c, r), the up-projection of keys absorbed;
- its values of the unit vectors are the up-projection of values.

So the layer's own queries, scales, gates and projections count, whatever they are.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .attention import LayerView, sharded_attention
from .sharded_cache import CausalMask, ShardedKVCache

ATTRIBUTES = ("kv_a_proj_with_mqa", "embed_q", "unembed_out")  # of every layer of the kind


class LatentView(LayerView):
    """The cache of a latent attention layer during one call of it.

    Args:
        cache: The layer's cache.
        mask: The mask of the call. The layer itself gets none.
    """

    def __init__(self, cache: ShardedKVCache, mask: CausalMask | None):
        self.cache = cache
        self.mask = mask
        self.offset = cache.offset
        self.keys: Any = mx.zeros(0)  # some layers tie them to other arrays
        self.latents = mx.zeros(0)
        self.rope_parts = mx.zeros(0)

    def update_and_fetch(self, latents: mx.array, rope_parts: mx.array) -> tuple[mx.array, mx.array]:
        """Cache ``[batch, 1, tokens, rank]`` and ``[batch, 1, tokens, rope dim]``; return unit vectors."""
        self.latents, self.rope_parts = self.cache.update_and_fetch(latents, rope_parts)
        rank = latents.shape[-1]
        size = rank + rope_parts.shape[-1]
        units = mx.broadcast_to(mx.eye(size, dtype=latents.dtype), (latents.shape[0], 1, size, size))
        return units[..., :rank], units[..., rank:]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: Any) -> mx.array:
        """Attend from the layer's queries; `k` and `v` are its keys and values of the unit vectors.

        `mask` is the part of the scores that the layer adds itself, or ``None``.
        """
        absorbed = q @ k.swapaxes(-1, -2)
        if mask is not None:
            absorbed = absorbed + mask / scale
        out = self.run(absorbed, mx.concatenate([self.latents, self.rope_parts], -1), scale, sinks)
        return out @ v[..., : out.shape[-1], :]

    def run(self, q: mx.array, k: mx.array, scale: float, sinks: Any) -> mx.array:
        """Attend from queries to tokens, both in the space of (c, r); return ``[batch, heads, tokens, rank]``."""
        return sharded_attention(q, k, self.latents, self.cache, scale, self.mask, sinks)
