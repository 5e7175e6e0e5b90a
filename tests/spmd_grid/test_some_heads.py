"""Ring attention for callers that hold some of the heads, and the grid itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra


def problem(rng: np.random.Generator, heads: int, tokens: int) -> list[mx.array]:
    shapes = ((1, 2 * heads, tokens, 32), (1, heads, tokens, 32), (1, heads, tokens, 32))
    return [mx.array(rng.standard_normal(shape, np.float32)) for shape in shapes]


def own_heads(x: mx.array, grid: ra.Grid) -> mx.array:
    part = grid.ring.rank % grid.tensor
    return mx.split(x, grid.tensor, axis=1)[part]


def test_ring_attention(grid: ra.Grid, rng: np.random.Generator) -> None:
    layout = ra.Layout.zigzag(97, grid.rows)
    whole = problem(rng, 3 * grid.tensor, 97)
    q, k, v = (layout.shard(own_heads(x, grid), grid.column.rank) for x in whole)
    out = ra.ring_attention(q, k, v, ring=grid.column, layout=layout, mask="causal")
    expected = mx.fast.scaled_dot_product_attention(*whole, scale=32**-0.5, mask="causal")
    own = layout.shard(own_heads(expected, grid), grid.column.rank)
    assert mx.abs(out - own).max() < 1e-5


def test_decode_attention(grid: ra.Grid, rng: np.random.Generator) -> None:
    layout = ra.Layout.contiguous(97, grid.rows)
    q, *kv = problem(rng, 3 * grid.tensor, 97)
    k, v = (layout.shard(own_heads(x, grid), grid.column.rank) for x in kv)
    last = own_heads(q[:, :, -1:], grid)
    out = ra.decode_attention(last, k, v, ring=grid.column, kv_layout=layout)
    expected = mx.fast.scaled_dot_product_attention(q, *kv, scale=32**-0.5, mask="causal")[:, :, -1:]
    assert mx.abs(out - own_heads(expected, grid)).max() < 1e-5


def test_the_grid(grid: ra.Grid) -> None:
    assert grid.rows * grid.tensor == grid.ring.size
    assert grid.column.size == grid.rows and grid.column.rank == grid.ring.rank // grid.tensor
    if grid.row is None:
        assert grid.tensor == 1 and grid.column is grid.ring
        return
    assert (grid.row.size(), grid.row.rank()) == (grid.tensor, grid.ring.rank % grid.tensor)
    ranks = mx.distributed.all_gather(mx.array([grid.ring.rank]), group=grid.row)
    assert ranks.tolist() == [grid.ring.rank // grid.tensor * grid.tensor + i for i in range(grid.tensor)]


def test_sums_have_the_same_bits(grid: ra.Grid) -> None:
    if grid.row is None:
        return
    own = mx.random.normal((7, 1001), key=mx.random.key(grid.ring.rank))
    whole = mx.distributed.all_sum(own, group=grid.row)
    rows = mx.distributed.all_gather(whole[None], group=grid.row)
    assert all(mx.array_equal(row, whole) for row in rows)


def test_wrong_arguments(grid: ra.Grid) -> None:
    """All ranks raise, and the ring still works."""
    with pytest.raises(ra.ArgumentError, match=f"tensor: {grid.ring.size + 1}, expected a divisor of {grid.ring.size}"):
        ra.grid(grid.ring, grid.ring.size + 1)
    with pytest.raises(ra.ArgumentError, match="tensor: 0"):
        ra.grid(grid.ring, 0)
    if grid.ring.size > 1:
        with pytest.raises(ra.ArgumentError, match="backend: 'mpi', expected one of 'ring', 'jaccl', 'nccl', or None"):
            ra.grid(grid.ring, grid.ring.size, backend="mpi")
        with pytest.raises(ra.ArgumentError, match="grid: tensor differs between ranks"):
            ra.grid(grid.ring, 1 if grid.ring.rank else grid.ring.size)
    if grid.row is not None and grid.rows > 1:
        message = f"tensor: {grid.ring.size}, expected {grid.tensor}: a process can join one row in its life"
        with pytest.raises(ra.ArgumentError, match=message):
            ra.grid(grid.ring, grid.ring.size)
    assert ra.grid(grid.ring, grid.tensor).row is grid.row
    grid.ring.barrier()
