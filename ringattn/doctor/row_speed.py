"""Speed of sums over the rows of a grid, over `mx.distributed`. All rows sum at the same time, as in a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from ..transport.grid import Grid

ROUNDS = 31  # small sums
SMALL = 1 << 12  # bytes of the hidden state of one token of a small model
LARGE = 1 << 23  # bytes of the hidden states of a round of prefill
REPEATS = 3


@dataclass(frozen=True)
class RowSpeed:
    """Speed of the sums over one row.

    Attributes:
        ranks: The ranks of the row.
        latency: Median seconds of a small sum.
        bandwidth: Bytes per second that each rank sends in a large sum.
    """

    ranks: tuple[int, ...]
    latency: float
    bandwidth: float


def measure_row(grid: Grid) -> RowSpeed:
    """Measure this rank's row. Collective over all ranks."""
    first = grid.ring.rank // grid.tensor * grid.tensor
    grid.ring.barrier()
    latency = median(_sum(grid, SMALL) for _ in range(ROUNDS))
    grid.ring.barrier()
    seconds = median(_sum(grid, LARGE) for _ in range(REPEATS))
    sent = LARGE * 2 * (grid.tensor - 1) / grid.tensor  # by MLX's ring: each part travels almost twice around
    return RowSpeed(tuple(range(first, first + grid.tensor)), latency, sent / seconds)


def _sum(grid: Grid, count: int) -> float:
    """Seconds of a sum of `count` bytes."""
    x = mx.ones(count // 4, mx.float32)
    mx.eval(x)
    start = time.perf_counter()
    mx.eval(mx.distributed.all_sum(x, group=grid.row))
    return time.perf_counter() - start
