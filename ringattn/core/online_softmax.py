"""The algebra of partial attention.

For one query with scores s_j and values v_j over a set A of keys, the state is

    m_A = max_j s_j      l_A = sum_j exp(s_j - m_A)      acc_A = sum_j exp(s_j - m_A) v_j

and the states of two disjoint sets merge exactly into that of their union (online softmax, Milakov and Gimelshein,
arXiv 1805.02867; Dao et al., arXiv 2205.14135):

    m = max(m_A, m_B)    l = l_A exp(m_A - m) + l_B exp(m_B - m)    acc likewise

The result is out = acc / l and lse = m + log l, a partial. Partials merge too, as states with m = lse, l = 1 and
acc = out, but near lse = 100 a float32 has lost seven bits, so hops carry states and only users see partials. m need
not be the maximum: any reference that neither overflows nor underflows gives the same result. No key at all is the
state (0, -inf, 0) and the partial (0, -inf), and merging it changes nothing.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError, ArgumentTypeError

Partial = tuple[mx.array, mx.array]
SMALL = 1 << 16  # numbers in a state that is made by NumPy


class State(NamedTuple):
    """What hops carry, float32: `acc` ``[B, H, L, Dv]``, `m` and `l` ``[B, H, L]``; of MLX, or all three of NumPy."""

    acc: Any
    m: Any
    l: Any

    @classmethod
    def empty(cls, batch: int, heads: int, tokens: int, dim: int) -> State:
        """The state over no keys, of MLX arrays."""
        rows = (batch, heads, tokens)
        if batch * heads * tokens * dim <= SMALL:  # here and now: an evaluation costs a switch of threads
            arrays = np.zeros((*rows, dim), np.float32), np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float32)
            return cls(*map(mx.array, arrays))
        return cls(mx.zeros((*rows, dim)), mx.full(rows, -mx.inf), mx.zeros(rows))


def merge_states(*states: State) -> State:
    """The state over the keys of all `states`, no two of which share one. Arrays of MLX, or all of NumPy."""
    xp = _library(states[0])
    m = reduce(xp.maximum, (state.m for state in states))
    weights = [_weight(xp, state.m, m) for state in states]
    acc = reduce(xp.add, (state.acc * weight[..., None] for state, weight in zip(states, weights)))
    return State(acc, m, reduce(xp.add, (state.l * weight for state, weight in zip(states, weights))))


def normalise(state: State, sinks: Any = None) -> tuple[Any, Any]:
    """`out` and `lse` of a state, both float32. `sinks` ``[H]``, float32, enters the denominator here, once."""
    xp, (acc, m, l) = _library(state), state
    if sinks is not None:
        total = xp.maximum(m, sinks[:, None])
        weight = _weight(xp, m, total)
        acc, l, m = acc * weight[..., None], l * weight + _weight(xp, sinks[:, None], total), total
    seen = l != 0
    l = xp.where(seen, l, 1)
    return acc / l[..., None], xp.where(seen, m + xp.log(l), -xp.inf)


def finish(state: State, sinks: mx.array | None, dtype: mx.Dtype) -> Partial:
    """`out` in `dtype` and the float32 lse of a state of MLX arrays."""
    out, lse = normalise(state, None if sinks is None else sinks.astype(mx.float32))
    return out.astype(dtype), lse


def merge(*partials: Partial) -> Partial:
    """Merge partial attention results over disjoint sets of keys.

    With ``mask="causal"`` or a window each call of `attention` has to know where its keys stand, by `offset` or
    `positions`: by default it takes its last key for that of the last query, and the result is wrong without an error.
    `offset` is the position of the first query less that of the part's first key. Four queries at the end of ten
    tokens, their keys in two parts:

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
            ``(0, -inf)`` stands for no key seen and changes nothing.

    Returns:
        The partial ``(out, lse)`` over all the keys, `out` in the partials' dtype. Computed in float32.

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
    """``exp(m - total)`` where ``m <= total``, and 0 for ``m = -inf`` even when `total` is -inf as well."""
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
