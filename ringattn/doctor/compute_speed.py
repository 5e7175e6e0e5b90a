"""Compute speed of one rank. Each measurement takes a fraction of a second.

All ranks measure at the same time. Ranks that share a host therefore measure their share of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..attention import attention
from ..bench.problem import AttentionShape, random_arrays
from ..core.device import uses_gpu

ENOUGH = 0.05  # seconds of one call after which no larger size is measured
SIZES = (256, 512, 1024, 2048, 4096)  # of matrices
READ = (1024, 2048, 4096)  # of matrices that are read; the last has 64 MB, more than most caches
REPEATS = 4  # of each size. The best counts: the first call also maps memory, and other work may disturb any
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)

Workload = Callable[[int], tuple[Callable[[], object], float]]  # size -> call, and its floating-point operations


@dataclass(frozen=True)
class ComputeSpeeds:
    """Floating-point operations per second of one rank.

    Attributes:
        mlx: Speed of MLX's float32 matrix product on its default device.
        numpy: Speed of NumPy's float32 matrix product.
        float16: Speed of MLX's float16 matrix product on a GPU; ``None`` without a GPU.
        bfloat16: Speed of MLX's bfloat16 matrix product on a GPU; ``None`` without a GPU.
        attention: Speed of `ringattn.attention` without a mask.
        spread: Largest ratio, over all kinds, of the median to the best time of equal measurements: about 1 where
            nothing else runs.
        read: Bytes per second at which MLX reads the matrix of a product with one row, as for a new token.
    """

    mlx: float
    numpy: float
    float16: float | None
    bfloat16: float | None
    attention: float
    spread: float
    read: float = 0.0


class Speed(NamedTuple):
    """Result of one kind of measurement: operations per second, and the spread as in `ComputeSpeeds`."""

    flops: float
    spread: float


def measure(dtype: mx.Dtype, heads: tuple[int, int], head_dim: int) -> ComputeSpeeds:
    """Time matrix products, and attention with the dtype, heads and head_dim of a model."""
    gpu = uses_gpu()
    workloads: dict[str, tuple[Workload, tuple[int, ...]]] = {
        "mlx": (lambda n: _mlx(n, mx.float32), SIZES),
        "numpy": (_numpy, SIZES),
        "read": (_read, READ),
        "attention": (lambda n: _attention(AttentionShape(dtype, head_dim, heads, n, n, causal=False)), TOKENS),
    }
    if gpu:
        workloads["float16"] = (lambda n: _mlx(n, mx.float16), SIZES)
        workloads["bfloat16"] = (lambda n: _mlx(n, mx.bfloat16), SIZES)
    found = {name: fastest(*workload) for name, workload in workloads.items()}
    return ComputeSpeeds(
        mlx=found["mlx"].flops,
        numpy=found["numpy"].flops,
        float16=found["float16"].flops if gpu else None,
        bfloat16=found["bfloat16"].flops if gpu else None,
        attention=found["attention"].flops,
        spread=max(speed.spread for speed in found.values()),
        read=found["read"].flops,
    )


def fastest(workload: Workload, sizes: tuple[int, ...]) -> Speed:
    """Highest speed over growing sizes. Stop after the first size that takes long enough."""
    best = Speed(0.0, 1.0)
    for size in sizes:
        call, flops = workload(size)
        seconds = [_time(call) for _ in range(REPEATS)]
        shortest = min(seconds)
        best = max(best, Speed(flops / shortest, median(seconds[1:]) / shortest))  # without the first, see `REPEATS`
        if shortest > ENOUGH:
            break
    return best


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)


def _mlx(n: int, dtype: mx.Dtype) -> tuple[Callable[[], object], float]:
    a = mx.ones((n, n), dtype)
    mx.eval(a)
    return lambda: mx.eval(a @ a), 2.0 * n**3


def _read(n: int) -> tuple[Callable[[], object], float]:
    a = mx.ones((n, n), mx.float32)
    x = mx.ones((1, n), mx.float32)
    mx.eval(a, x)
    return lambda: mx.eval(x @ a), 4.0 * n**2


def _numpy(n: int) -> tuple[Callable[[], object], float]:
    a = np.ones((n, n), np.float32)
    return lambda: a @ a, 2.0 * n**3


def _attention(shape: AttentionShape) -> tuple[Callable[[], object], float]:
    q, k, v = random_arrays(shape)
    return lambda: mx.eval(attention(q, k, v)), shape.flops
