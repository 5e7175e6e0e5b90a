"""One process of MLX: its own attention, with the BLAS that ringattn gives it."""

from __future__ import annotations

from importlib.metadata import version

import ringattn as ra  # before MLX, for its BLAS

import mlx.core as mx  # isort: skip
import numpy as np

from ..problem import Problem, contiguous
from . import Work

assert ra


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend with ``mx.fast.scaled_dot_product_attention``."""
    mask = "causal" if problem.causal else None

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=problem.dim**-0.5, mask=mask)

    return mlx_work(problem, contiguous(problem.tokens, rank, size), attend, lambda: None)


def mlx_work(problem: Problem, positions: np.ndarray, attend, barrier) -> Work:
    """Work that calls ``attend(q, k, v)`` on MLX arrays."""
    mx.set_default_device(mx.cpu)
    *leaves, dout = (mx.array(x[None, :, positions]) for x in problem.arrays())
    mx.eval(leaves, dout)

    def call() -> list[mx.array]:
        if problem.gradient:
            (out,), gradients = mx.vjp(attend, leaves, [dout])
            found = [out, *gradients]
        else:
            found = [attend(*leaves)]
        mx.eval(found)
        return found

    return Work(positions, call, lambda: [np.array(x[0]) for x in call()], barrier)


def versions() -> dict[str, str]:
    """Versions of the libraries."""
    return {name: version(name) for name in ("mlx", "numpy")}
