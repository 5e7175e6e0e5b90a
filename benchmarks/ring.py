"""Two ranks with one thread each against one process with two threads: what the ring itself costs."""

from __future__ import annotations

import sys
from itertools import product
from statistics import median

import mlx.core as mx
import numpy as np

import ringattn as ra

from .common import chunk_of, medians, run_ranks, sampled_error, show, write_result

TOKENS, HEADS, ROUNDS = 8192, 8, 3


def main() -> None:
    """Take turns between the two, and compare the medians."""
    rows = []
    for dim, mask in product((64, 128), ("full", "causal")):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for ranks in (1, 2):
                found = run_ranks("benchmarks.ring", ranks, 2 // ranks, dim, mask)
                seconds[ranks].append(max(found))
        one, two = (median(seconds[ranks]) for ranks in (1, 2))
        rows.append([dim, mask, f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}"])
    head = ["head_dim", "mask", "1 process x 2 threads, s", "2 ranks x 1 thread, s", "throughput of the ring"]
    show(f"{TOKENS} tokens, {HEADS} heads, float32 (aim: at least 0.95)", head, rows)


def worker() -> None:
    """One process's share: the median seconds of a call."""
    dim, causal = int(sys.argv[2]), sys.argv[3] == "causal"
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        layout = ra.Layout.zigzag(TOKENS, ring.size)
        q, k, v = (
            mx.array(np.concatenate([chunk_of(name, *span, HEADS, dim) for span in layout.spans[ring.rank]], 1)[None])
            for name in "qkv"
        )

        def call() -> mx.array:
            ring.barrier()
            return ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal" if causal else None)

        error = sampled_error(np.array(call()[0]), layout.positions(ring.rank), TOKENS, dim, causal=causal)
        assert error < 1e-5, error
        write_result(ring.rank, medians({"call": call}, repeats=9)["call"])


if __name__ == "__main__":
    worker()
