"""Checks of every feature on the local kernels, and on a ring.

``python -m ringattn.verify.feature_checks FILE`` is the program of each rank of ``ringattn verify``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import backends
from ..attention import attention
from ..decode_attention import decode_attention
from ..layout import Layout
from ..linear_attention import linear_attention
from ..ring.call import check_ring
from ..ring.schedule import STRATEGIES
from ..ring_attention import ring_attention
from ..ring_linear_attention import ring_linear_attention
from ..transport import init
from ..transport.base import Ring
from ..transport.interface import Transport
from .features import FEATURES
from .findings import Findings, Results
from .linear_features import LINEAR_FEATURES
from .linear_oracle import LinearCase
from .oracle import Case, ratios

MLX = "mlx"  # the column of what consists of MLX's operations


def verify_local() -> Findings:
    """Check every feature on every kernel of this machine, and linear attention, which has no kernels of its own."""
    findings = Findings()
    for name, make in FEATURES.items():
        case = make()
        for kernel in backends.available():
            findings.add(name, kernel, f"{name} on {kernel}", partial(_local, case, kernel))
    for name, make_linear in LINEAR_FEATURES.items():
        findings.add(name, MLX, f"{name} on {MLX}", partial(_linear, make_linear()))
    return findings


def _local(case: Case, kernel: str) -> float:
    out, lse = attention(case.q, case.k, case.v, backend=kernel, return_lse=True, **case.options)
    return max(ratios(case, out, lse))


def _linear(case: LinearCase) -> float:
    return max(case.ratios(*linear_attention(case.q, case.k, case.v, return_state=True, **case.options)))


def verify_ring(ring: Ring) -> Results:
    """Check every feature on every strategy of a ring, with zigzag queries, and in decoding. Collective.

    Returns:
        Largest fractions over the ranks, the same on all ranks.
    """
    transport = check_ring(ring)
    results: Results = {}
    for name, make in FEATURES.items():
        case = make()
        mine = {strategy: _ring(ring, case, strategy) for strategy in STRATEGIES}
        mine["decode"] = _decode(ring, case)
        results[name] = _largest(transport, mine)
    for name, make_linear in LINEAR_FEATURES.items():
        results[name] = _largest(transport, {"states": _linear_ring(ring, make_linear())})
    return results


def _largest(ring: Transport, mine: dict[str, float]) -> dict[str, float]:
    """Largest fractions of all ranks. Collective."""
    gathered = [json.loads(bytes(reply)) for reply in ring.exchange([memoryview(json.dumps(mine).encode())])]
    return {key: max(fractions[key] for fractions in gathered) for key in mine}


def _layouts(case: Case, size: int) -> tuple[Layout, Layout]:
    prefix = case.k.shape[2] - case.q.shape[2]
    layout = Layout.zigzag(case.q.shape[2], size, start=prefix)
    return layout, Layout.cyclic(prefix, size, 16).extend(layout) if prefix else layout


def _ring(ring: Ring, case: Case, strategy: str) -> float:
    layout, kv_layout = _layouts(case, ring.size)
    rank = ring.rank
    options = dict(case.options)
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
    """Check `decode_attention` with the last two queries, as new tokens whose keys are in the cache already."""
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


def _linear_ring(ring: Ring, case: LinearCase) -> float:
    """Check `ring_linear_attention` with zigzag tokens, whose rank has two spans."""
    layout = Layout.zigzag(case.q.shape[2], ring.size)
    options: dict[str, Any] = {name: layout.shard(x, ring.rank) for name, x in case.tokens.items()}
    q, k, v = (options.pop(name) for name in "qkv")
    options |= {"state": case.state, "scale": case.scale}
    out, state = ring_linear_attention(q, k, v, ring=ring, layout=layout, return_state=True, **options)
    return max(case.ratios(out, state, layout.positions(ring.rank)))


def ring_findings(results: Results) -> Findings:
    """Findings from the results of `verify_ring`."""
    findings = Findings()
    for name, row in results.items():
        for key, fraction in row.items():
            findings.record(name, key, f"{name} on {key}", fraction)
    return findings


def main() -> None:
    """Check the ring. Rank 0 writes the results to the file that the command line names."""
    with init() as ring, np.errstate(all="ignore"):
        results = verify_ring(ring)
        if ring.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))
        ring.barrier()


if __name__ == "__main__":
    main()
