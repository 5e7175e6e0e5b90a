"""Rotary positional encoding of tokens that are not contiguous, such as those of a rank."""

from __future__ import annotations

from math import prod

import mlx.core as mx

from .core.validation import FLOATS, Positions, check_array, check_token_positions
from .errors import ArgumentError, ArgumentTypeError

BASE = 10000.0


def rope(
    x: mx.array,
    dims: int,
    *,
    positions: Positions,
    traditional: bool = False,
    base: float | None = None,
    scale: float = 1.0,
    freqs: mx.array | None = None,
) -> mx.array:
    """Rotary positional encoding (`mx.fast.rope`) of tokens at any positions.

    `mx.fast.rope` takes one offset and contiguous tokens. A rank of a ring holds tokens of several spans::

        q = ringattn.rope(q, q.shape[-1], positions=layout.positions(ring.rank))

    The values are those of `mx.fast.rope` at the same positions. Differentiable in `x`.

    Args:
        x: Queries or keys ``[batch, ..., tokens, head_dim]`` in float16, bfloat16 or float32.
        dims: The number of dimensions that are rotated, from the first one on. The others are unchanged.
        positions: The position of each token, ascending int32 ``[tokens]``.
        traditional: Rotate consecutive dimensions (True), or the first half of `dims` with the second half (False).
        base: The base of the angular frequencies. Default 10000, without `freqs`.
        scale: The factor of the positions.
        freqs: The reciprocals of the angular frequencies ``[dims / 2]``, instead of `base`.

    Returns:
        The rotated array, in x's shape and dtype.

    Raises:
        ArgumentError: If `x` or `positions` is wrong, or both `base` and `freqs` are given.
    """
    check_array("x", x)
    if x.dtype not in FLOATS:
        raise ArgumentTypeError(f"x: {x.dtype}, expected float16, bfloat16 or float32")
    if x.ndim < 3:
        raise ArgumentError(f"x: shape {x.shape}, expected at least 3 dimensions [batch, ..., tokens, head_dim]")
    if base is not None and freqs is not None:
        raise ArgumentError(f"base: {base} together with freqs, expected one of the two")
    *_, tokens, dim = x.shape
    offsets = mx.array(check_token_positions("positions", positions, tokens))
    if freqs is None and base is None:
        base = BASE
    if x.size == 0:
        return x
    by_token = mx.moveaxis(x, -2, 0)  # each token becomes a batch entry with its own offset
    rotated = mx.fast.rope(
        by_token.reshape(tokens, prod(x.shape[:-2]), 1, dim),
        dims,
        traditional=traditional,
        base=base,
        scale=scale,
        offset=offsets,
        freqs=freqs,
    )
    return mx.moveaxis(rotated.reshape(by_token.shape), 0, -2)
