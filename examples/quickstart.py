"""Attention over a sequence on four processes: ``ringattn launch -n 4 -- examples/quickstart.py``."""

import mlx.core as mx

import ringattn as ra

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4096, 8, 2, 64

with ra.init() as ring:
    layout = ra.Layout.zigzag(TOKENS, ring.size)  # equal causal work on every rank
    tokens = layout.local_length(ring.rank)

    # This rank's part of the sequence. In a model, q, k and v come from its own tokens, with rope at
    # layout.positions(ring.rank). No rank holds the parts of the others.
    mx.random.seed(ring.rank)
    q = mx.random.normal((1, HEADS, tokens, HEAD_DIM))
    k = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM))
    v = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM))

    out = ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal")

    # Attend from one new token, which all ranks have, to the sharded cache.
    new = ring.broadcast(mx.random.normal((1, HEADS, 1, HEAD_DIM)), root=0)
    step = ra.decode_attention(new, k, v, ring=ring, kv_layout=layout)

    # Gather everything to compare with one process. Only a small example can do so. Every rank must call gather.
    q, k, v, gathered = (layout.gather(x, ring) for x in (q, k, v, out))
    if ring.rank == 0:
        pairs = (gathered, ra.attention(q, k, v, mask="causal")), (step, ra.attention(new, k, v))
        difference = max(mx.abs(a - b).max().item() for a, b in pairs)
        print(f"{TOKENS} tokens on {ring.size} ranks, {tokens} of them on rank 0: out {out.shape}, next {step.shape}")
        print(f"Largest difference from one process: {difference:.1e}")
