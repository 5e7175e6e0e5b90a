"""Tests of rings of NVIDIA GPUs.

Run ``RINGATTN_TEST_CUDA=1 ringattn launch -n 4 -- python -m pytest tests/spmd/test_gpus.py``.

Where each rank has a GPU of its own, blocks travel by NCCL, else through the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_gradient import check as check_gradient
from test_ring import rows_of, run

from ringattn.native.cuda import on_gpu
from ringattn.transport import Ring
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import Case, GradientCase, check, random_case

pytestmark = pytest.mark.skipif(not on_gpu(), reason="MLX's default device is no NVIDIA GPU")


def causal(seed: int, tokens: int) -> Case:
    return replace(random_case(seed, q_len=tokens, k_len=tokens), options={"mask": "causal"})


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "scattered"])
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "gather"])
@pytest.mark.parametrize("of_rank", [lambda rank: "cuda", lambda rank: "host" if rank == 1 else "cuda"])
def test_kernels(ring: Ring, kind: str, strategy: str, of_rank: Callable[[int], str]) -> None:
    """All ranks compute on their GPU, or one of them on its processor."""
    case = causal(3, 700)
    before = ring.links
    out, lse, layout = run(case, ring, kind, strategy=strategy, backend=of_rank(ring.rank))
    check(case, out, lse, rows=rows_of(layout, ring.rank), what=f"{kind} {strategy}")
    if ring.has_gpus and strategy != "gather" and of_rank(1) == "cuda":
        assert ring.links is not None
    elif before is None:
        assert ring.links is None


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_gradients(ring: Ring, strategy: str) -> None:
    for feature in ("causal", "causal, bfloat16"):
        check_gradient(GradientCase.random(FEATURES[feature]()), ring, "zigzag", strategy=strategy, backend="cuda")


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_bits_repeat(ring: Ring, strategy: str) -> None:
    case = causal(5, 3000)
    results = [run(case, ring, "zigzag", strategy=strategy, backend="cuda")[:2] for _ in range(5)]
    first, *rest = [[np.array(x.astype(mx.float32)) for x in result] for result in results]
    assert all(np.array_equal(a, b) for again in rest for a, b in zip(first, again))
