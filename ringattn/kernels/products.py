"""Matrix products in which NaN and infinity reach only the rows that see them.

The weight of a hidden pair is zero, but ``0 * NaN`` is NaN: a plain product carries one NaN into every row. The
products of the gradient can replace NaN and infinity by zeros, because the scores already make the weights of all
visible pairs NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core.gradients import Rows


def zero_nonfinite(x: Any, xp: Any = mx) -> Any:
    """Replace NaN and infinity by zeros. `xp` is the library of `x`, mlx.core or NumPy."""
    return xp.where(xp.isfinite(x), x, xp.zeros((), x.dtype))


def mark_nonfinite_rows(rows: Rows, xp: Any = mx) -> Rows:
    """Make `dout` finite. A row with NaN or infinity in `dout` gets the lse NaN, which makes its weights NaN."""
    good = xp.isfinite(rows.dout).all(-1) | (rows.lse == xp.inf)
    return Rows(zero_nonfinite(rows.dout, xp), xp.where(good, rows.lse, xp.array(xp.nan, xp.float32)), rows.delta)


def select_visible(x: mx.array, seen: mx.array, otherwise: float) -> mx.array:
    """Take `x` where `seen`, else `otherwise`. The gradient of mx.where multiplies by zero, which propagates NaN."""
    return _select_visible(x, seen, mx.array(otherwise))


def scores(q: mx.array, k: mx.array) -> mx.array:
    """Multiply ``q k^T``, float32 ``[..., Lq, D]`` and ``[..., Lk, D]``. The gradient of a hidden pair must be zero."""
    return _scores(q, k)


def weighted_values(p: mx.array, v: mx.array, seen: mx.array) -> mx.array:
    """Multiply ``p v``, float32 ``[..., Lq, Lk]`` and ``[..., Lk, Dv]``. NaN where a visible value is not finite.

    `seen` is 1.0 for visible pairs and 0.0 for hidden ones, in p's shape. The weight of a hidden pair must be zero.
    """
    return _weighted_values(p, v, seen)


def _select_visible_gradient(arrays: Sequence[mx.array], dresult: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, seen, otherwise = arrays
    return mx.where(seen, dresult, 0.0), mx.zeros_like(seen), mx.zeros_like(otherwise)


def _scores_gradient(arrays: Sequence[mx.array], dscores: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    q, k = arrays
    return dscores @ zero_nonfinite(k), dscores.swapaxes(-1, -2) @ zero_nonfinite(q)


def _product(p: mx.array, v: mx.array, seen: mx.array) -> mx.array:
    reached = seen @ mx.where(mx.isfinite(v), 0.0, 1.0)
    return mx.where(reached > 0, mx.nan, p @ zero_nonfinite(v))


def _product_gradient(arrays: Sequence[mx.array], dout: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    p, v, seen = arrays
    dv = _product(p.swapaxes(-1, -2), dout, seen.swapaxes(-1, -2))
    return dout @ zero_nonfinite(v).swapaxes(-1, -2), dv, mx.zeros_like(seen)


def _with_gradient(function: Callable[..., mx.array], gradient: Callable[..., Sequence[mx.array]]) -> Callable:
    made: Any = mx.custom_function(function)
    made.vjp(gradient)
    return made


_select_visible = _with_gradient(lambda x, seen, otherwise: mx.where(seen, x, otherwise), _select_visible_gradient)
_scores = _with_gradient(lambda q, k: q @ k.swapaxes(-1, -2), _scores_gradient)
_weighted_values = _with_gradient(_product, _product_gradient)
