"""ringattn: `ring_attention` over MPI, or `attention` in one process."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import ringattn as ra  # before MLX, for its BLAS

import mlx.core as mx  # isort: skip

from ..problem import Problem, contiguous
from . import Work
from .mlx import mlx_work


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend over the ring that the launcher started (`way` ``"ring"``), or in this process (``"alone"``)."""
    mask = "causal" if problem.causal else None
    if way == "alone":

        def attend_alone(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return ra.attention(q, k, v, mask=mask)

        return mlx_work(problem, contiguous(problem.tokens, rank, size), attend_alone, lambda: None)
    ring = _ring()
    layout = ra.Layout.zigzag(problem.tokens, ring.size)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ra.ring_attention(q, k, v, ring=ring, layout=layout, mask=mask)

    return mlx_work(problem, layout.positions(ring.rank), attend, ring.barrier)


@cache
def _ring() -> ra.Ring:
    return ra.init()


def versions() -> dict[str, str]:
    """Versions of the libraries."""
    return {name: version(name) for name in ("ringattn", "mlx", "numpy", "mpi4py")}
