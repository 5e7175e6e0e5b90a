"""Time of decode_attention on 4 local ranks against one MPI_Allgather of the same bytes."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.verify.oracle import Case, check

from .common import medians, run_ranks, show, write_result

RANKS = 4
CACHE = 512  # tokens per rank


def main() -> None:
    """Compare both for two sizes of model."""
    rows = []
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128)):
        found = run_ranks("benchmarks.decode", RANKS, 1, heads, kv_heads, dim)
        middle = sorted(found, key=lambda one: one["decode"])[RANKS // 2]
        us = {name: f"{seconds * 1e6:.0f}" for name, seconds in middle.items()}
        ratio = middle["decode"] / middle["allgather"]
        alike = middle["decode"] / middle["both"]
        figures = [us["decode"], us["allgather"], f"{ratio:.1f}", us["both"], f"{alike:.2f}"]
        rows.append([f"{heads}/{kv_heads} x {dim}", *figures])
    head = ["heads x head_dim", "decode us", "allgather us", "ratio", "attention, then allgather us", "ratio"]
    show(f"decoding one token, {CACHE} cached tokens a rank, {RANKS} ranks (aim: at most 1.5)", head, rows)


def worker() -> None:
    """Measure the medians of one rank."""
    from mpi4py import MPI

    heads, kv_heads, dim = map(int, sys.argv[2:])
    mx.set_default_device(mx.cpu)
    random = np.random.default_rng(0)
    tokens = CACHE * RANKS
    q, k, v = (
        mx.array(random.standard_normal((1, h, n, dim), np.float32))
        for h, n in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens))
    )
    with ra.init() as ring:
        layout = ra.Layout.contiguous(tokens, ring.size)
        mine = [mx.contiguous(layout.shard(x, ring.rank)) for x in (k, v)]
        mx.eval(mine)
        case = Case(q, k, v, np.array([tokens - 1]), np.arange(tokens), {"mask": "causal"})
        out, lse = ra.decode_attention(q, *mine, ring=ring, kv_layout=layout, return_lse=True)
        check(case, out, lse)
        block = np.zeros(64 + heads * (dim + 2) * 4, np.uint8)
        everything = np.zeros((ring.size, block.size), np.uint8)

        calls = {
            "decode": lambda: ra.decode_attention(q, *mine, ring=ring, kv_layout=layout),
            "allgather": lambda: MPI.COMM_WORLD.Allgather(block, everything),
            "both": lambda: (mx.eval(ra.attention(q, *mine)), MPI.COMM_WORLD.Allgather(block, everything)),
        }
        for call in calls.values():
            medians({"warm": call}, repeats=50)
        write_result(ring.rank, {name: medians({name: call}, repeats=400)[name] for name, call in calls.items()})


if __name__ == "__main__":
    worker()
