"""Tests of each feature's gradient with each strategy. Random combinations, on more ranks, are in `test_gradient`."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_gradient import check, gradients

from ringattn.ring.schedule import STRATEGIES
from ringattn.transport import Ring
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import GradientCase


@pytest.mark.two_ranks
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(ring: Ring, feature: str, strategy: str) -> None:
    check(GradientCase.random(FEATURES[feature]()), ring, "zigzag", strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_both_ways(both: Ring, feature: str, strategy: str) -> None:
    check(GradientCase.random(FEATURES[feature]()), both, "zigzag", strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", ["window", "boolean", "additive", "segments"])
def test_keys_that_no_query_sees_may_hold_any_bits(ring: Ring, strategy: str, way: str) -> None:
    """Keys that no query sees may hold any bits, on any rank."""
    problem = GradientCase.random(FEATURES["longer cache than queries"]())
    case, unseen = problem.case, np.arange(300) % 7 == 3
    if way == "window":
        unseen = np.arange(300) < 250  # the queries have positions 260 to 299
    case.options = {
        "window": {"window": 11},
        "boolean": {"mask": mx.array(np.broadcast_to(~unseen, (40, 300)))},
        "additive": {"mask": mx.array(np.where(unseen, -np.inf, np.zeros((40, 300))).astype(np.float32))},
        "segments": {"segments": (mx.zeros((1, 40), mx.int32), mx.array(unseen[None].astype(np.int32)))},
    }[way]
    want = gradients(problem, ring, "zigzag", strategy=strategy)
    for name in ("k", "v"):
        for value in (mx.nan, mx.inf):
            clean = getattr(case, name)
            broken = replace(case, **{name: mx.where(mx.array(unseen)[:, None], mx.array(value), clean)})
            got = gradients(replace(problem, case=broken), ring, "zigzag", strategy=strategy)
            for x, y in got.items():
                assert mx.array_equal(y, want[x]), (x, name, value)
