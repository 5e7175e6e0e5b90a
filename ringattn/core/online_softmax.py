"""The algebra of partial attention.

For one query with scores s_j and values v_j over a set A of keys, the state is

    m_A = max_j s_j      l_A = sum_j exp(s_j - m_A)      acc_A = sum_j exp(s_j - m_A) v_j

and the states of two disjoint sets merge exactly into that of their union (online softmax, Milakov and Gimelshein,
arXiv 1805.02867; Dao et al., arXiv 2205.14135):

    m = max(m_A, m_B)    l = l_A exp(m_A - m) + l_B exp(m_B - m)    acc likewise

The result is the partial out = acc / l, lse = m + log l. Partials merge too, as states with m = lse, l = 1 and
acc = out. Near lse = 100 a float32 lse has lost seven bits, so hops carry states and only users see partials. m need
not be the maximum: any reference that neither overflows nor underflows gives the same result. An empty set of keys has
the state (0, -inf, 0) and the partial (0, -inf). Merging it changes nothing.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError, ArgumentTypeError

Partial = tuple[mx.array, mx.array]
SMALL = 1 << 16  # NumPy makes empty states of up to this many numbers


class State(NamedTuple):
    """State of query rows, float32: `acc` ``[B, H, L, Dv]``, `m` and `l` ``[B, H, L]``, all of MLX or all of NumPy."""

    acc: Any
    m: Any
    l: Any

    @classmethod
    def empty(cls, batch: int, heads: int, tokens: int, dim: int) -> State:
        """Make the state over no keys, of MLX arrays."""
        rows = (batch, heads, tokens)
        if batch * heads * tokens * dim <= SMALL:  # an evaluation by MLX would cost a thread switch
            acc = np.zeros((*rows, dim), np.float32)
            m = np.full(rows, -np.inf, np.float32)
            l = np.zeros(rows, np.float32)
            return cls(mx.array(acc), mx.array(m), mx.array(l))
        return cls(mx.zeros((*rows, dim)), mx.full(rows, -mx.inf), mx.zeros(rows))


def merge_states(*states: State) -> State:
    """Merge states over disjoint keys. All arrays are of MLX, or all of NumPy."""
    xp = _library(states[0])
    m = reduce(xp.maximum, (state.m for state in states))
    weights = [_weight(xp, state.m, m) for state in states]
    acc = reduce(xp.add, (state.acc * weight[..., None] for state, weight in zip(states, weights)))
    return State(acc, m, reduce(xp.add, (state.l * weight for state, weight in zip(states, weights))))


def normalise(state: State, sinks: Any = None) -> tuple[Any, Any]:
    """Compute `out` and `lse` of a state, both float32. Float32 `sinks` ``[H]`` enter the denominator here, once."""
    xp = _library(state)
    acc, m, l = state
    if sinks is not None:
        total = xp.maximum(m, sinks[:, None])
        weight = _weight(xp, m, total)
        acc = acc * weight[..., None]
        l = l * weight + _weight(xp, sinks[:, None], total)
        m = total
    seen = l != 0
    l = xp.where(seen, l, 1)
    return acc / l[..., None], xp.where(seen, m + xp.log(l), -xp.inf)


def finish(state: State, sinks: mx.array | None, dtype: mx.Dtype) -> Partial:
    """Compute `out` in `dtype` and the float32 lse of a state of MLX arrays."""
    out, lse = normalise(state, None if sinks is None else sinks.astype(mx.float32))
    return out.astype(dtype), lse


def merge(*partials: Partial) -> Partial:
    """Merge partial attention results over disjoint sets of keys.

    With ``mask="causal"`` or a window, give each call of `attention` the positions of its keys by `offset` or
    `positions`. By default `attention` aligns its last key with the last query: the result is then wrong, without an
    error. `offset` is the position of the first query minus that of the part's first key. This example has four queries
    at the end of ten tokens, and their keys in two parts:

    >>> import mlx.core as mx, ringattn as ra
    >>> k = v = mx.random.normal((1, 2, 10, 8))
    >>> q, first = k[:, :, 6:], 6
    >>> partials = [
    ...     ra.attention(
    ...         q, k[:, :, a:b], v[:, :, a:b], mask="causal", offset=first - a, return_lse=True
    ...     )
    ...     for a, b in ((0, 8), (8, 10))
    ... ]
    >>> out, lse = ra.merge(*partials)
    >>> mx.allclose(out, ra.attention(q, k, v, mask="causal"), atol=1e-5).item()
    True

    Args:
        *partials: Pairs ``(out, lse)``: `out` ``[batch, heads, q tokens, value head_dim]`` in float16, bfloat16 or
            float32, the same in all, and its float32 natural log-sum-exp `lse` ``[batch, heads, q tokens]``.
            ``(0, -inf)`` means that no key was seen, and changes nothing.

    Returns:
        The partial ``(out, lse)`` over all the keys, computed in float32. `out` has the partials' dtype.

    Raises:
        ArgumentError: If there is no partial, or shapes or dtypes disagree.
    """
    for i, partial in enumerate(partials):
        _check_partial(i, partial, partials[0])
    if not partials:
        raise ArgumentError("partials: none given, expected at least one (out, lse)")
    states = [State(out.astype(mx.float32), lse, mx.ones(lse.shape)) for out, lse in partials]
    return finish(merge_states(*states), None, partials[0][0].dtype)


def _library(state: State) -> Any:
    return mx if isinstance(state.m, mx.array) else np


def _weight(xp: Any, m: Any, total: Any) -> Any:
    """Compute ``exp(m - total)`` for ``m <= total``. The result is 0 for ``m = -inf``, even where `total` is -inf."""
    nothing = m == -xp.inf
    return xp.where(nothing, 0, xp.exp(m - xp.where(nothing, 0, total)))


def _check_partial(i: int, partial: Partial, first: Partial) -> None:
    name = f"partials[{i}]"
    if not isinstance(partial, (tuple, list)) or len(partial) != 2:
        raise ArgumentTypeError(f"{name}: {type(partial).__name__}, expected a pair (out, lse)")
    out, lse = partial
    if not isinstance(out, mx.array) or not isinstance(lse, mx.array):
        raise ArgumentTypeError(f"{name}: {type(out).__name__} and {type(lse).__name__}, expected two mx.arrays")
    if out.dtype not in (mx.float16, mx.bfloat16, mx.float32):
        raise ArgumentTypeError(f"{name}: out is {out.dtype}, expected float16, bfloat16 or float32")
    if lse.dtype != mx.float32:
        raise ArgumentTypeError(f"{name}: lse is {lse.dtype}, expected float32")
    if out.shape[:-1] != lse.shape or out.ndim < 1:
        raise ArgumentError(
            f"{name}: out {out.shape} and lse {lse.shape}, expected lse of out's shape less its last axis"
        )
    if out.shape != first[0].shape or out.dtype != first[0].dtype:
        was = f"{out.shape} {out.dtype}"
        raise ArgumentError(f"{name}: out is {was}, expected {first[0].shape} {first[0].dtype}, as in partials[0]")
