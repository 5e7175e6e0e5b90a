"""The fused kernels for Apple GPUs; what they do not do goes to plain mx operations."""

from __future__ import annotations

from contextlib import suppress

import mlx.core as mx
import numpy as np

from ..core.gradients import Gradients, Rows
from ..core.online_softmax import State
from ..core.rules import Rules
from ..kernels import blockwise_backward, reference
from ..kernels.interface import Ending, Problem
from .backward import delta, weights
from .dispatch import attend
from .forward import LEAST
from .self_test import UnusableError
from .tiling import MOST_DIMS

NAME = "metal"
DIFFERENTIABLE = False
LAZY = True


def forward(
    q: mx.array, k: mx.array, v: mx.array, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State | None
) -> State:
    """Attend and return the state; see `ringattn.kernels`."""
    if _fused(q, k, v):
        before = None if state is None else State(_wide(state.acc), state.m, state.l)
        with suppress(UnusableError):
            acc, m, l = attend(Problem(_wide(q), _wide(k), _wide(v), q_pos, k_pos, rules), before, None)
            return State(acc[..., : v.shape[3]], m, l)
    return reference.forward(q, k, v, q_pos, k_pos, rules, state)


def finished(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_pos: np.ndarray,
    k_pos: np.ndarray,
    rules: Rules,
    sinks: mx.array | None,
    dtype: mx.Dtype,
    with_lse: bool,
) -> tuple[mx.array, mx.array | None]:
    """Attend and return ``(out, lse)``; see `ringattn.kernels`."""
    if _fused(q, k, v):
        ending = Ending(dtype, with_lse, None if sinks is None else mx.contiguous(sinks.astype(mx.float32)))
        with suppress(UnusableError):
            out, *lse = attend(Problem(_wide(q), _wide(k), _wide(v), q_pos, k_pos, rules), None, ending)
            return out[..., : v.shape[3]], lse[0] if lse else None
    return reference.finished(q, k, v, q_pos, k_pos, rules, sinks, dtype, with_lse)


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """What `backward` needs of each query row; see `ringattn.kernels`."""
    if lse.size == 0:
        return Rows.of(out, lse, dout, dlse)
    return Rows(dout, mx.where(lse == -mx.inf, mx.inf, lse), delta(out, lse, dout, dlse))


def backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_pos: np.ndarray,
    k_pos: np.ndarray,
    rules: Rules,
    rows: Rows,
    sums: Gradients,
) -> Gradients:
    """`sums` with the gradients added; see `ringattn.kernels`."""
    return blockwise_backward.gradient(q, k, v, q_pos, k_pos, rules, rows, sums, weights)


def _fused(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether the kernels do this: larger head dims, and problems without a token, go to plain mx operations."""
    return max(q.shape[3], v.shape[3]) <= MOST_DIMS and 0 not in (q.size, k.size, v.size)


def _wide(x: mx.array) -> mx.array:
    """`x` with head_dim at least `LEAST`: smaller arrays reach a kernel by another type of pointer."""
    return x if x.shape[3] >= LEAST else mx.pad(x, [(0, 0)] * 3 + [(0, LEAST - x.shape[3])])
