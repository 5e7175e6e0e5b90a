"""`ringattn.rope` against `mx.fast.rope` on the whole sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.verify.oracle import FLOATS

LAYOUTS = {
    "contiguous": ra.Layout.contiguous(40, 3),
    "zigzag": ra.Layout.zigzag(41, 3),
    "cyclic": ra.Layout.cyclic(40, 3, 1),
    "weighted, far": ra.Layout.weighted(50, [1, 0, 3], start=1_000_000),
}
OPTIONS = {
    "usual": {},
    "traditional": {"traditional": True},
    "base and scale": {"base": 500.0, "scale": 0.25},
    "freqs": {"freqs": mx.arange(1, 9).astype(mx.float32) * 3},
}


def whole(x: mx.array, dims: int, start: int, traditional=False, base=None, scale=1.0, freqs=None) -> mx.array:
    base = 10000.0 if base is None and freqs is None else base
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=start, freqs=freqs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_rank_has_its_part_of_the_whole(kind, options, dtype):
    layout = LAYOUTS[kind]
    x = mx.array(np.random.default_rng(0).standard_normal((2, 3, layout.length, 24)), mx.float32).astype(dtype)
    expected = whole(x, 16, layout.start, **OPTIONS[options])
    for rank in range(3):
        found = ra.rope(layout.shard(x, rank), 16, positions=layout.positions(rank), **OPTIONS[options])
        assert found.dtype == dtype and mx.array_equal(found, layout.shard(expected, rank))


@pytest.mark.parametrize("rank", range(3))
def test_its_gradient_is_that_of_the_whole(rank):
    layout = LAYOUTS["zigzag"]
    x, weights = (mx.array(np.random.default_rng(i).standard_normal((1, 2, 41, 16)), mx.float32) for i in range(2))
    mine = layout.shard(weights, rank)
    expected = mx.grad(lambda x: (whole(x, 16, 0) * weights).sum())(x)
    found = mx.grad(lambda x: (ra.rope(x, 16, positions=layout.positions(rank)) * mine).sum())(layout.shard(x, rank))
    assert mx.allclose(found, layout.shard(expected, rank), atol=1e-6)


@pytest.mark.parametrize("kind", [list, np.array, mx.array])
def test_positions_may_be_any_sequence(kind):
    x = mx.ones((1, 3, 8))
    assert mx.array_equal(ra.rope(x, 8, positions=kind([3, 4, 9]))[:, 2:], whole(x[:, 2:], 8, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: list, expected an mx.array"),
        ({"x": mx.zeros((1, 3, 8), mx.int32)}, "x: mlx.core.int32, expected float16, bfloat16 or float32"),
        ({"x": mx.zeros((3, 8))}, r"x: shape \(3, 8\), expected at least 3 dimensions"),
        ({"positions": [0, 1]}, r"positions: shape \(2,\), expected \(3,\)"),
        ({"positions": [0, 2, 1]}, "positions: not ascending"),
        ({"positions": 4}, "positions: int, expected int32 positions"),
        ({"base": 5.0, "freqs": mx.ones(4)}, "base: 5.0 together with freqs, expected one of the two"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"x": mx.zeros((1, 3, 8)), "dims": 8, "positions": [0, 1, 2], **change}
    with pytest.raises(ra.ArgumentError, match=f"^{message}"):
        ra.rope(**arguments)
