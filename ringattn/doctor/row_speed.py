"""Speed of sums over the rows of a grid, over `mx.distributed`. All rows sum at the same time, as in a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from ..bench.timing import medians
from ..transport.grid import Grid

ROUNDS = 31  # small sums
WIDTH = 1024  # numbers of the hidden state of one token of a small model
LARGE = 1 << 23  # bytes of the hidden states of a round of prefill
REPEATS = 3


@dataclass(frozen=True)
class RowSpeed:
    """Speed of the sums over one row.

    Attributes:
        ranks: The ranks of the row.
        latency: Seconds that a small sum adds to a product before it. Between products its threads sleep, so that it
            takes longer than one of many sums in a row.
        bandwidth: Bytes per second that each rank sends in a large sum.
    """

    ranks: tuple[int, ...]
    latency: float
    bandwidth: float


def measure_row(grid: Grid) -> RowSpeed:
    """Measure this rank's row. Collective over all ranks."""
    first = grid.ring.rank // grid.tensor * grid.tensor
    grid.ring.barrier()
    latency = _latency(grid)
    grid.ring.barrier()
    seconds = median(_large_sum(grid) for _ in range(REPEATS))
    sent = LARGE * 2 * (grid.tensor - 1) / grid.tensor  # by MLX's ring: each part travels almost twice around
    return RowSpeed(tuple(range(first, first + grid.tensor)), latency, sent / seconds)


def _latency(grid: Grid) -> float:
    """Seconds of a sum of the outputs of a product, beyond the product's."""
    x = mx.ones((1, WIDTH))
    weights = mx.ones((WIDTH, WIDTH))
    mx.eval(x, weights)
    calls = {
        "product": lambda: mx.eval(x @ weights),
        "sum": lambda: mx.eval(mx.distributed.all_sum(x @ weights, group=grid.row)),
    }
    seconds = medians(calls, ROUNDS)
    return max(1e-6, seconds["sum"] - seconds["product"])


def _large_sum(grid: Grid) -> float:
    x = mx.ones(LARGE // 4, mx.float32)
    mx.eval(x)
    start = time.perf_counter()
    mx.eval(mx.distributed.all_sum(x, group=grid.row))
    return time.perf_counter() - start
