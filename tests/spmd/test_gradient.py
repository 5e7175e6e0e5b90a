"""Tests of the gradient of `ring_attention`, against the closed form on the whole problem in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_ring import LAYOUTS, layouts

import ringattn as ra
from ringattn.ring.schedule import STRATEGIES
from ringattn.transport import Ring
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import GradientCase, random_case


def gradients(problem: GradientCase, ring: Ring, kind: str, **more) -> dict[str, mx.array]:
    """Gather the whole gradients from all ranks."""
    case, rank = problem.case, ring.rank
    layout, kv_layout = layouts(case, kind, ring.size)
    named = problem.differentiable
    rows = {"q": layout, "k": kv_layout, "v": kv_layout}
    mine = {name: rows[name].shard(x, rank) if name in rows else x for name, x in named.items()}
    whole_mask = case.options.get("mask")
    by_rows = isinstance(whole_mask, mx.array) and whole_mask.ndim > 1 and whole_mask.shape[-2] > 1
    options = dict(case.options)
    if by_rows:
        options["mask"] = layout.shard(whole_mask, rank, axis=-2)
        mine |= {"mask": options["mask"]} if "mask" in mine else {}
    if "segments" in options:
        q_ids, k_ids = options["segments"]
        options["segments"] = layout.shard(q_ids, rank, axis=1), kv_layout.shard(k_ids, rank, axis=1)

    def function(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(mine, arrays))
        q, k, v = (given.pop(name) for name in "qkv")
        every = {**options, **given, **more}
        out, lse = ra.ring_attention(q, k, v, ring=ring, layout=layout, kv_layout=kv_layout, return_lse=True, **every)
        return [out, mx.where(lse == -mx.inf, 0.0, lse)]

    cotangents = [layout.shard(problem.dout, rank), layout.shard(problem.dlse, rank)]
    _, found = mx.vjp(function, list(mine.values()), cotangents)
    whole = {}
    for name, x in zip(mine, found):
        assert x.shape == mine[name].shape and x.dtype == mine[name].dtype
        if name in rows:
            whole[name] = rows[name].gather(x, ring)
        elif name == "mask" and by_rows:
            whole[name] = layout.gather(x, ring, axis=x.ndim - 2)
        else:
            whole[name] = ring.all_reduce(x)
    return whole


def check(problem: GradientCase, ring: Ring, kind: str, **more) -> None:
    ratios = problem.ratios(gradients(problem, ring, kind, **more))
    assert all(ratio <= 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", None])
def test_every_layout(ring: Ring, kind: str, strategy: str | None) -> None:
    check(GradientCase.random(FEATURES["longer cache than queries"]()), ring, kind, strategy=strategy)


@pytest.mark.parametrize("seed", range(30))
def test_random_combinations(ring: Ring, seed: int) -> None:
    kind, strategy = LAYOUTS[seed % len(LAYOUTS)], (*STRATEGIES, None)[seed % 4]
    check(GradientCase.random(random_case(seed)), ring, kind, strategy=strategy)


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("feature", ["causal", "everything, bfloat16", "additive mask"])
def test_other_kernels(ring: Ring, feature: str, backend: str) -> None:
    for strategy in ("pass_kv", "pass_q"):
        check(GradientCase.random(FEATURES[feature]()), ring, "zigzag", backend=backend, strategy=strategy)


def test_one_row_of_a_mask_for_all_queries(ring: Ring) -> None:
    case = FEATURES["causal"]()
    bias = mx.array(np.random.default_rng(0).standard_normal((1, 1, 1, case.k.shape[2])).astype(np.float32))
    case.options = {"mask": bias, "window": 40}
    for strategy in ("pass_kv", "pass_q"):
        check(GradientCase.random(case), ring, "zigzag", strategy=strategy)


def test_same_bits_again(ring: Ring) -> None:
    problem = GradientCase.random(FEATURES["causal, bfloat16"]())
    for strategy in ("pass_kv", "pass_q"):
        first, again = (gradients(problem, ring, "zigzag", strategy=strategy) for _ in range(2))
        assert all(mx.array_equal(first[name], again[name]) for name in first)


def test_under_checkpoint(ring: Ring) -> None:
    case = FEATURES["causal"]()
    layout = ra.Layout.zigzag(113, ring.size)
    x = layout.shard(case.q, ring.rank)

    def loss(x: mx.array) -> mx.array:
        return (ra.ring_attention(x, x * 2, x + 1, ring=ring, layout=layout, mask="causal") ** 2).sum()

    assert mx.allclose(mx.grad(mx.checkpoint(loss))(x), mx.grad(loss)(x), rtol=1e-6)


def test_several_calls_in_one_loss(ring: Ring) -> None:
    """All ranks compute the gradients of several calls in the same order."""
    x = mx.array(np.random.default_rng(ring.rank).standard_normal((1, 2, 4, 8)).astype(np.float32))
    layout = ra.Layout.contiguous(4 * ring.size, ring.size)

    def first(x: mx.array) -> mx.array:
        return (ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal") ** 2).sum()

    def second(x: mx.array) -> mx.array:
        return (ra.ring_attention(x, x, 2 * x, ring=ring, layout=layout, window=(2, 3), softcap=3.0) ** 2).sum()

    both = mx.grad(lambda x: first(x) + second(x))(x)
    assert mx.allclose(both, mx.grad(first)(x) + mx.grad(second)(x), atol=1e-4)
