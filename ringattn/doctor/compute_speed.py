"""How fast one rank computes, each measurement in a fraction of a second.

All ranks measure at the same time, so ranks that share a host see what each gets of it.
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
from ..bench.kernel import Shape, random_arrays

ENOUGH = 0.05  # seconds of one call, after which no larger problem is tried
SIZES = (256, 512, 1024, 2048, 4096)  # of matrices
TIMES = 4  # each size is done, of which the best counts: the first touches memory, another may be disturbed
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)

Work = Callable[[int], tuple[Callable[[], object], float]]  # size -> what to do, and its floating-point operations


@dataclass(frozen=True)
class Speeds:
    """Floating-point operations per second of one rank.

    Attributes:
        mlx: Of MLX's float32 matrix product on its default device.
        numpy: Of NumPy's.
        float16: Of MLX's on a GPU; ``None`` without one.
        bfloat16: Likewise.
        attention: Of `ringattn.attention` without a mask.
        spread: How many times as long as the best of equal measurements their median took, at most of all kinds: about
            1 where nothing else runs.
    """

    mlx: float
    numpy: float
    float16: float | None
    bfloat16: float | None
    attention: float
    spread: float


class Speed(NamedTuple):
    """One kind of measurement: floating-point operations per second, and their spread as in `Speeds`."""

    flops: float
    spread: float


def measure(dtype: mx.Dtype, heads: tuple[int, int], head_dim: int) -> Speeds:
    """Time matrix products, and attention on arrays of such a model."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    works: dict[str, tuple[Work, tuple[int, ...]]] = {
        "mlx": (lambda n: _mlx(n, mx.float32), SIZES),
        "numpy": (_numpy, SIZES),
        "attention": (lambda n: _attention(Shape(dtype, head_dim, heads, n, n, causal=False)), TOKENS),
    }
    if gpu:
        works["float16"] = (lambda n: _mlx(n, mx.float16), SIZES)
        works["bfloat16"] = (lambda n: _mlx(n, mx.bfloat16), SIZES)
    found = {name: fastest(*work) for name, work in works.items()}
    return Speeds(
        mlx=found["mlx"].flops,
        numpy=found["numpy"].flops,
        float16=found["float16"].flops if gpu else None,
        bfloat16=found["bfloat16"].flops if gpu else None,
        attention=found["attention"].flops,
        spread=max(speed.spread for speed in found.values()),
    )


def fastest(work: Work, sizes: tuple[int, ...]) -> Speed:
    """The most operations per second over ever larger sizes, until one takes long enough."""
    best = Speed(0.0, 1.0)
    for size in sizes:
        call, flops = work(size)
        seconds = [_time(call) for _ in range(TIMES)]
        shortest = min(seconds)
        best = max(best, Speed(flops / shortest, median(seconds[1:]) / shortest))  # not the first, see `TIMES`
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


def _numpy(n: int) -> tuple[Callable[[], object], float]:
    a = np.ones((n, n), np.float32)
    return lambda: a @ a, 2.0 * n**3


def _attention(shape: Shape) -> tuple[Callable[[], object], float]:
    q, k, v = random_arrays(shape)
    return lambda: mx.eval(attention(q, k, v)), shape.flops
