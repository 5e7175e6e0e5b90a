"""Tests of blocks that travel from GPU to GPU through pinned memory of the hosts, where the hosts are the GPUs."""

from __future__ import annotations

import mlx.core as mx
import pytest
from host_network import HostGpu
from test_gradient import check as check_gradient
from test_ring import LAYOUTS, rows_of, run

import ringattn as ra
from ringattn.ring import staging
from ringattn.ring.schedule import STRATEGIES
from ringattn.transport import Ring
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import GradientCase, check, random_case


@pytest.fixture
def gpu(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> HostGpu | None:
    """The GPU of a rank; rank 1 has none, so that the ring is mixed."""
    own = None if ring.rank == 1 else HostGpu()
    monkeypatch.setattr(staging, "driver", lambda: own)
    return own


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_cases(ring: Ring, gpu: HostGpu | None, kind: str, strategy: str) -> None:
    for seed in range(3):
        case = random_case(1000 * LAYOUTS.index(kind) + seed)
        out, lse, layout = run(case, ring, kind, strategy=strategy, backend="host" if gpu is None else "reference")
        check(case, out, lse, rows=rows_of(layout, ring.rank), what=f"{seed=} {kind} {strategy}")
    assert gpu is None or gpu.copied or ring.size == 1 or kind in ("weighted", "one rank")  # rank 0 may hold nothing


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_gradients(ring: Ring, gpu: HostGpu | None, strategy: str) -> None:
    for feature in ("causal", "everything, bfloat16", "additive mask"):
        problem = GradientCase.random(FEATURES[feature]())
        check_gradient(problem, ring, "zigzag", strategy=strategy, backend="reference")


def test_gather(ring: Ring, gpu: HostGpu | None) -> None:
    x = mx.arange(2 * 40 * 3, dtype=mx.float32).reshape(2, 40, 3).astype(mx.bfloat16)
    layout = ra.Layout.zigzag(40, ring.size)
    assert mx.array_equal(layout.gather(layout.shard(x, ring.rank, axis=1), ring, axis=1), x)
