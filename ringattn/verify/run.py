"""Run every feature on the local kernels, or on the ring that this process belongs to."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import backends
from ..attention import attention
from ..decode_attention import decode_attention
from ..layout import Layout
from ..ring.arguments import check_ring
from ..ring.schedule import STRATEGIES
from ..ring_attention import ring_attention
from ..transport import init
from ..transport.base import Ring
from .features import FEATURES
from .findings import Findings, Results
from .oracle import Case, ratios


def verify_local() -> Findings:
    """Every feature on every kernel of this machine."""
    found = Findings()
    for name, make in FEATURES.items():
        case = make()
        for kernel in backends.available():
            found.add(name, kernel, f"{name} on {kernel}", partial(_local, case, kernel))
    return found


def _local(case: Case, kernel: str) -> float:
    out, lse = attention(case.q, case.k, case.v, backend=kernel, return_lse=True, **case.options)
    return max(ratios(case, out, lse))


def verify_ring(ring: Ring) -> Results:
    """Every feature on every strategy of a ring, with zigzag queries, and decoding. Collective.

    Returns:
        The largest fraction over the ranks, the same on all.
    """
    transport = check_ring(ring)
    results: Results = {}
    for name, make in FEATURES.items():
        case = make()
        mine = {strategy: _ring(ring, case, strategy) for strategy in STRATEGIES}
        mine["decode"] = _decode(ring, case)
        told = transport.exchange([memoryview(json.dumps(mine).encode())])
        results[name] = {key: max(json.loads(bytes(one))[key] for one in told) for key in mine}
    return results


def _layouts(case: Case, size: int) -> tuple[Layout, Layout]:
    prefix = case.k.shape[2] - case.q.shape[2]
    layout = Layout.zigzag(case.q.shape[2], size, start=prefix)
    return layout, Layout.cyclic(prefix, size, 16).extend(layout) if prefix else layout


def _ring(ring: Ring, case: Case, strategy: str) -> float:
    (layout, kv_layout), rank, options = _layouts(case, ring.size), ring.rank, dict(case.options)
    if isinstance(options.get("mask"), mx.array):
        options["mask"] = layout.shard(options["mask"], rank, axis=-2)
    if "segments" in options:
        q_ids, k_ids = options["segments"]
        options["segments"] = layout.shard(q_ids, rank, axis=1), kv_layout.shard(k_ids, rank, axis=1)
    out, lse = ring_attention(
        layout.shard(case.q, rank),
        kv_layout.shard(case.k, rank),
        kv_layout.shard(case.v, rank),
        ring=ring,
        layout=layout,
        kv_layout=kv_layout,
        strategy=strategy,
        return_lse=True,
        **options,
    )
    return max(ratios(case, out, lse, layout.positions(rank) - layout.start))


def _decode(ring: Ring, case: Case) -> float:
    """The last two queries, as new tokens whose keys are in the cache already."""
    last = slice(case.q.shape[2] - 2, case.q.shape[2])
    options = {"mask": None, **case.options}
    if isinstance(options["mask"], mx.array):
        options["mask"] = options["mask"][..., last, :]
    if "segments" in options:
        options["segments"] = options["segments"][0][:, last], options["segments"][1]
    tail = replace(case, q=case.q[:, :, last], q_pos=case.q_pos[last], options=dict(options))
    kv_layout = Layout.weighted(case.k.shape[2], range(1, ring.size + 1))
    if "segments" in options:
        options["segments"] = options["segments"][0], kv_layout.shard(options["segments"][1], ring.rank, axis=1)
    k, v = (kv_layout.shard(x, ring.rank) for x in (case.k, case.v))
    out, lse = decode_attention(tail.q, k, v, ring=ring, kv_layout=kv_layout, return_lse=True, **options)
    return max(ratios(tail, out, lse))


def findings(results: Results) -> Findings:
    """What `verify_ring` found, with what failed."""
    found = Findings()
    for name, row in results.items():
        for key, fraction in row.items():
            found.note(name, key, f"{name} on {key}", fraction)
    return found


def main() -> None:
    """What a rank started by ``ringattn verify`` does: rank 0 writes the results to the file it is given."""
    with init() as ring, np.errstate(all="ignore"):
        results = verify_ring(ring)
        if ring.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))
        ring.barrier()


if __name__ == "__main__":
    main()
