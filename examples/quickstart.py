"""Attention over a sequence that four processes share: ``ringattn launch -n 4 -- examples/quickstart.py``."""

import mlx.core as mx

import ringattn as ra

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4096, 8, 2, 64

with ra.init() as ring:
    layout = ra.Layout.zigzag(TOKENS, ring.size)  # equal causal work on every rank
    tokens = layout.local_length(ring.rank)

    # This rank's part of the sequence. In a model these come from its own tokens, with rope at
    # layout.positions(ring.rank); no rank ever holds the others' part.
    mx.random.seed(ring.rank)
    q = mx.random.normal((1, HEADS, tokens, HEAD_DIM))
    k = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM))
    v = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM))

    out = ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal")

    # One new token, known to all ranks, against the sharded cache.
    new = ring.broadcast(mx.random.normal((1, HEADS, 1, HEAD_DIM)), root=0)
    step = ra.decode_attention(new, k, v, ring=ring, kv_layout=layout)
    print(f"rank {ring.rank} of {ring.size}: {tokens} tokens, out {out.shape}, next {step.shape}")
