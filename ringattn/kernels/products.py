"""Matrix products that keep NaN and infinity from rows that do not see them.

The weight of a hidden pair is zero, but ``0 * NaN`` is NaN: a plain product carries one bad token into every row. The
products of the gradient do not need the bad numbers themselves, because the scores already make the weights of all
visible pairs NaN. So these products take zeros in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core.gradients import Rows


def finite(x: Any, xp: Any = mx) -> Any:
    """`x` with zeros in the place of NaN and infinity; `xp` is the library of `x`, mlx.core or NumPy."""
    return xp.where(xp.isfinite(x), x, xp.zeros((), x.dtype))


def marked(rows: Rows, xp: Any = mx) -> Rows:
    """`rows` with a finite `dout`; a row whose `dout` is not finite has the lse NaN, which makes its weights NaN."""
    good = xp.isfinite(rows.dout).all(-1) | (rows.lse == xp.inf)
    return Rows(finite(rows.dout, xp), xp.where(good, rows.lse, xp.array(xp.nan, xp.float32)), rows.delta)


def shown(x: mx.array, seen: mx.array, otherwise: float) -> mx.array:
    """`x` where `seen`, else `otherwise`. The gradient of mx.where multiplies with zero, which passes NaN on."""
    return _shown(x, seen, mx.array(otherwise))


def scores(q: mx.array, k: mx.array) -> mx.array:
    """``q k^T`` of float32 ``[..., Lq, D]`` and ``[..., Lk, D]``. Its gradient by a hidden pair has to be zero."""
    return _scores(q, k)


def weighted(p: mx.array, v: mx.array, seen: mx.array) -> mx.array:
    """``p v`` of float32 ``[..., Lq, Lk]`` and ``[..., Lk, Dv]``, NaN where a visible value is not finite.

    `seen` says which pairs are visible: 1.0 or 0.0, in p's shape. The weight of a hidden pair has to be zero.
    """
    return _weighted(p, v, seen)


def _shown_gradient(arrays: Sequence[mx.array], by_result: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, seen, otherwise = arrays
    return mx.where(seen, by_result, 0.0), mx.zeros_like(seen), mx.zeros_like(otherwise)


def _scores_gradient(arrays: Sequence[mx.array], by_scores: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    q, k = arrays
    return by_scores @ finite(k), by_scores.swapaxes(-1, -2) @ finite(q)


def _product(p: mx.array, v: mx.array, seen: mx.array) -> mx.array:
    spoiled = seen @ mx.where(mx.isfinite(v), 0.0, 1.0)
    return mx.where(spoiled > 0, mx.nan, p @ finite(v))


def _product_gradient(arrays: Sequence[mx.array], by_out: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    p, v, seen = arrays
    by_v = _product(p.swapaxes(-1, -2), by_out, seen.swapaxes(-1, -2))
    return by_out @ finite(v).swapaxes(-1, -2), by_v, mx.zeros_like(seen)


def _with_gradient(function: Callable[..., mx.array], gradient: Callable[..., Sequence[mx.array]]) -> Callable:
    made: Any = mx.custom_function(function)
    made.vjp(gradient)
    return made


_shown = _with_gradient(lambda x, seen, otherwise: mx.where(seen, x, otherwise), _shown_gradient)
_scores = _with_gradient(lambda q, k: q @ k.swapaxes(-1, -2), _scores_gradient)
_weighted = _with_gradient(_product, _product_gradient)
